"""Forward TCP connections: tests/proxy.py PORT TARGET. SIGSTOP makes a network that stalls."""

import asyncio
import contextlib
import sys


async def forward(reader, writer):
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main(port, target):
    async def accept(reader, writer):
        try:
            upstream = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
        else:
            await asyncio.gather(forward(reader, upstream[1]), forward(upstream[0], writer))

    async with await asyncio.start_server(accept, "127.0.0.1", port) as server:
        await server.serve_forever()


asyncio.run(main(*map(int, sys.argv[1:])))
