"""A small tree of Python with a knob for each kind of debt, turned up one at a time by the tests."""

KNOBS = {
    "branches": 20, "depth": 7, "parameters": 12, "lines": 90, "methods": 30, "top_level": 15, "copies": 3,
    "packages": 14, "circle": 1, "private": 4, "globals": 3, "stars": 1, "undocumented": 3, "untyped": 4,
    "todos": 3, "bare_excepts": 3, "suppressions": 2, "siblings": 13, "constants": 430, "untyped_returns": 2,
}  # fmt: skip
"""Each knob and how far it is turned."""

CLONE = '''

def {name}({one}: list[int], {two}: int) -> int:
    """Walk and weigh."""
    {total} = {two} * 3
    while {total}.bit_length() < 12 and not sorted({one}):
        {total} = max(min({total}, abs({two})), hash(repr({one}))) + len({one})
        for {item} in reversed({one}):
            {total} += pow({item}, {two}, 11) - round({item} / 7) + divmod({item}, 5)[0]
    return {total} - sum(map(abs, {one})) + ord(chr({two}))
'''


def tree(knobs):
    """Return the tree's files for how far each knob is turned."""
    at = {**dict.fromkeys(KNOBS, 0), **knobs}
    lines = [] if at["undocumented"] > 2 else ['"""A module."""']
    lines += [f"import package{number}" for number in range(at["packages"])]
    lines += ["from friend import *"] * at["stars"] + ["import friend"] * at["circle"]
    lines += [f"import sibling{number}" for number in range(at["siblings"])]
    lines += ["VALUES = [1, 2]", "TOTAL = 0", *(f"C{number} = {number}" for number in range(at["constants"]))]
    lines += [f"if VALUES[0] == {number}:\n    TOTAL += {number}" for number in range(at["top_level"])]
    lines += ["# TODO: later"] * at["todos"] + ["ANY = VALUES  # noqa"] * at["suppressions"]
    lines += _worker(at)
    lines += ["\n\nclass Holder:"] + ([] if at["undocumented"] > 1 else ['    """A holder."""'])
    lines += [f'\n    def method{number}(self) -> int:\n        """Give."""\n        return {number}' for number in
              range(1 + at["methods"])]  # fmt: skip
    lines += [f'\n\ndef untyped{number}():\n    """Give."""\n    return {number}' for number in
              range(at["untyped_returns"])]  # fmt: skip
    for copy in range(at["copies"]):
        names = {key: f"{key}{copy}" for key in ("name", "one", "two", "total", "item")}
        lines.append(CLONE.format(**names))
    friend = ['"""A friend."""', *["import planted"] * at["circle"], "KNOWN = 1"]
    siblings = {f"sibling{number}.py": f"N = {number}\n" for number in range(13)}
    return {"planted.py": "\n".join(lines) + "\n", "friend.py": "\n".join(friend) + "\n", **siblings}


def _worker(at):
    typed = 4 - at["untyped"]
    parameters = [f"p{number}" + (": int" if number < typed else "") for number in range(4 + at["parameters"])]
    parameters = [text + (": int" if ":" not in text and number >= 4 else "") for number, text in enumerate(parameters)]
    lines = [f"\n\ndef worker({', '.join(parameters)}) -> int:"]
    lines += [] if at["undocumented"] else ['    """Work."""']
    lines += ["    global TOTAL", "    TOTAL = p0"] if at["globals"] else []
    lines += [f"    global G{number}\n    G{number} = p0" for number in range(1, at["globals"])]
    lines += [f"    value{number} = p0 + {number}" for number in range(at["lines"])]
    lines += [f"    print(p{number}._hidden)" for number in range(at["private"])]
    lines += [f"    if p0 == {number}:\n        print(p1, {number})" for number in range(at["branches"])]
    lines += ["    try:\n        print(p0)\n    except:\n        print(p1)"] * at["bare_excepts"]
    lines += [f"{'    ' * (level + 1)}for index{level} in range(p0):" for level in range(at["depth"])]
    return [*lines, f"{'    ' * (at['depth'] + 1)}print(p2, p3)", "    return p0"]
