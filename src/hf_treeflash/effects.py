"""Whether calling a function of the caller's changes nothing, as far as its code shows."""

import builtins
import dis
import types

import torch

from .memory import recall, remember

# What a function may call and look up besides what it is given: these only read.
READING = {
    "all",
    "any",
    "bool",
    "dict",
    "enumerate",
    "filter",
    "float",
    "frozenset",
    "int",
    "isinstance",
    "len",
    "list",
}
READING |= {"map", "max", "min", "range", "reversed", "set", "sorted", "str", "sum", "tuple", "zip", "True", "False"}
READING_METHODS = {"copy", "count", "device", "dim", "dtype", "get", "index", "item", "items", "keys", "ndim", "numel"}
READING_METHODS |= {"shape", "size", "startswith", "endswith", "tolist", "values"}
DATA = {bool, int, float, str, bytes, tuple, list, dict, set, frozenset, range, torch.Tensor, type(None)}
CHANGING = ("STORE_GLOBAL", "STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "DELETE", "IMPORT", "YIELD", "LOAD_SUPER")


def changes_nothing(function) -> bool:
    """Return whether a function only reads: its arguments, constants, data that it closes over, others that only read.

    Methods, callable objects and whatever is not certain count as changing something. What was seen of a function is
    remembered with it.
    """
    if not isinstance(function, types.FunctionType):
        return False
    seen = recall("effects", function)
    if seen is None:
        seen = _only_reads(function, set())
        remember("effects", seen, function)
    return seen


def _only_reads(function: types.FunctionType, under_way: set) -> bool:
    if function in under_way:
        return True
    under_way.add(function)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    try:
        outer = {name: cell.cell_contents for name, cell in cells.items()}
    except ValueError:  # not filled yet
        return False
    return _code_reads(function.__code__, outer, function.__globals__, under_way)


def _code_reads(code: types.CodeType, outer: dict, names: dict, under_way: set) -> bool:
    for step in dis.get_instructions(code):
        if step.opname.startswith(CHANGING):
            return False
        if step.opname == "STORE_DEREF" and step.argval in code.co_freevars:
            return False
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval not in READING_METHODS:
            return False
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            known = names.get(step.argval, getattr(builtins, step.argval, None))
            if not _may_be_used(step.argval, known, step.argval in names, under_way):
                return False
        if step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF") and step.argval in outer:
            if not _may_be_used(step.argval, outer[step.argval], True, under_way):
                return False
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    # What an inner function closes over is this one's own, or was looked at with this one.
    return all(_code_reads(part, outer, names, under_way) for part in inner)


def _may_be_used(name: str, value, is_own: bool, under_way: set) -> bool:
    if type(value) in DATA:
        return True
    if isinstance(value, types.FunctionType):
        return _only_reads(value, under_way)
    return not is_own and name in READING


__all__ = ["changes_nothing"]
