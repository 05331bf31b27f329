"""The two scripts stand alone; what both need is the same text in both."""

import ast

from conftest import ROOT

EXPECTED = {"OutputLost", "shown", "say", "complain", "explain"}
EXPECTED |= {"read_command_line", "wrong_usage", "nodes_of"}


def definitions(script):
    """The source text of the functions and classes at a script's top level, by name."""
    source = (ROOT / script).read_text()
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [each for each in ast.parse(source).body if isinstance(each, kinds)]
    return {each.name: ast.get_source_segment(source, each) for each in found}


def test_functions_that_both_scripts_have_are_the_same_text():
    producer, worker = definitions("new_task.py"), definitions("worker.py")
    both = producer.keys() & worker.keys() - {"main"}
    assert both >= EXPECTED
    for name in both:
        assert producer[name] == worker[name]
