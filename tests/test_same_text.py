"""The two scripts stand alone; what both need is the same text in both."""

import ast
import re

from conftest import ROOT

SCRIPTS = ["new_task.py", "worker.py"]
OWN = {"main", "read_command_line", "on_signal", "ERRORS", "LONGEST_NAME"}
EXPECTED = {"shown", "say", "complain", "explain", "amqp_urls", "HINTS", "SHORTENED", "UNSAFE"}


def definitions(script):
    """The source text of what a script defines at its top level, by name."""
    source = (ROOT / script).read_text()
    for each in ast.parse(source).body:
        if isinstance(each, ast.Assign):
            yield ast.unparse(each.targets[0]), ast.get_source_segment(source, each)
        elif isinstance(each, (ast.FunctionDef, ast.ClassDef)):
            yield each.name, ast.get_source_segment(source, each)


def test_what_both_scripts_define_is_the_same_text():
    producer, worker = dict(definitions("new_task.py")), dict(definitions("worker.py"))
    both = producer.keys() & worker.keys() - OWN
    assert both >= EXPECTED
    for name in both:
        assert producer[name] == worker[name]


def test_both_scripts_and_requirements_txt_name_the_same_versions():
    (required,) = (ROOT / "requirements.txt").read_text().split()
    metadata = [
        re.search("^# /// script\n(# .*\n)+?# ///$", (ROOT / script).read_text(), re.M)[0]
        for script in SCRIPTS
    ]
    assert metadata[0] == metadata[1]
    assert f'dependencies = ["{required}"]' in metadata[0]
    assert 'requires-python = ">=3.9"' in metadata[0]
