"""`entrenar completion bash|zsh`: a script that completes commands, verbs, flags, their values and the names of runs.

What can be completed is read from the help of each command, so it is what a person sees there. The script holds it all:
pressing the tab key starts no Python.
"""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from entrenar.cli import flags
from entrenar.cli.main import COMMANDS, main

_FLAG = re.compile(r"^ {2,8}(?:-\w(?: [^,]+)?, )?(--[a-z][a-z0-9-]*)(?:,|(?: (\S.*?))?(?:  |$))")
_VERB = re.compile(r"^ {4}([a-z][a-z0-9-]*)(?:  |$)")
_TAKE_RUNS = ("watch", "report", "runs show", "runs compare", "runs rm")

_BASH = """
_entrenar() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} place= word values
  if [ "$current" = = ]; then current=
  elif [ "$previous" = = ]; then previous=${COMP_WORDS[COMP_CWORD-2]}; fi
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case " $(_entrenar_verbs "$place") " in *" $word "*) place="${place:+$place }$word" ;; esac
  done
  case "$current" in
    -*) values=$(_entrenar_flags "$place") ;;
    *) values=$(_entrenar_values "$place $previous")
      [ -n "$values" ] || values="$(_entrenar_verbs "$place") $(_entrenar_runs "$place")" ;;
  esac
  COMPREPLY=($(compgen -W "$values" -- "$current"))
}
complete -o default -F _entrenar entrenar
"""

_ZSH = """
_entrenar() {
  local place= word values
  for word in "${(@)words[2,CURRENT-1]}"; do
    case " $(_entrenar_verbs "$place") " in *" $word "*) place="${place:+$place }$word" ;; esac
  done
  case "${words[CURRENT]}" in
    -*) values=$(_entrenar_flags "$place") ;;
    *) values=$(_entrenar_values "$place ${words[CURRENT-1]}")
      [ -n "$values" ] || values="$(_entrenar_verbs "$place") $(_entrenar_runs "$place")" ;;
  esac
  compadd -- ${=values} || _files
}
if [ "${funcstack[1]}" = _entrenar ]; then _entrenar; else compdef _entrenar entrenar; fi
"""

_RUNS = """
_entrenar_runs() {
  local run
  case "$1" in
    TAKE_RUNS)
      for run in runs/*/; do
        [ -e "$run/config.toml" ] && run=${run#runs/} && printf '%s\\n' "${run%/}"
      done ;;
  esac
}
"""


def run(words: Sequence[str]) -> int:
    """Print the script; return the exit code."""
    arguments = flags.parser("completion", "Print a script that completes entrenar's commands in a shell.")
    arguments.epilog = (
        "  entrenar completion bash > ~/.local/share/bash-completion/completions/entrenar\n"
        '  entrenar completion zsh > "${fpath[1]}/_entrenar"'
    )
    arguments.add_argument("shell", choices=("bash", "zsh"))
    parsed = flags.parse(arguments, words)
    print(script(parsed.shell))
    return 0


def script(shell: str) -> str:
    """Return the script for a shell."""
    known = Known()
    known.add_command("")
    parts = [
        *(["#compdef entrenar"] if shell == "zsh" else []),
        f"# Completion of entrenar for {shell}, written by `entrenar completion {shell}`.",
        _cases("_entrenar_verbs", known.verbs),
        _cases("_entrenar_flags", known.flags),
        _cases("_entrenar_values", known.values),
        _RUNS.strip().replace("TAKE_RUNS", " | ".join(f'"{command}"' for command in _TAKE_RUNS)),
        (_BASH if shell == "bash" else _ZSH).strip(),
    ]
    return "\n".join(parts)


def _cases(name: str, words: dict[str, list[str]]) -> str:
    lines = [f"  '{place}') echo '{' '.join(found)}' ;;" for place, found in words.items() if found]
    return "\n".join([f"{name}() {{", '  case "$1" in', *lines, "  esac", "}"])


@dataclass
class Known:
    """What can be completed: verbs and flags by command, values by command and flag."""

    verbs: dict[str, list[str]] = field(default_factory=dict)
    flags: dict[str, list[str]] = field(default_factory=dict)
    values: dict[str, list[str]] = field(default_factory=dict)

    def add_command(self, place: str) -> None:
        """Take in the help of a command, and of its verbs."""
        text = _help(place.split())
        self.verbs[place] = list(COMMANDS) if not place else _verbs(text)
        self.flags[place] = ["--help"]
        for line in text.splitlines():
            if (match := _FLAG.match(line)) and match[1] not in self.flags[place]:
                self.flags[place].append(match[1])
                self.values[f"{place} {match[1]}"] = choices(match[2] or "")
        for verb in self.verbs[place]:
            self.add_command(f"{place} {verb}".strip())


def _help(words: Sequence[str]) -> str:
    """Return the help of a command, the whole one where `--help` is a part of it."""
    text = _said([*words, "--help"])
    return _said([*words, "--help-all"]) if "--help-all" in text else text


def _said(words: Sequence[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(words)
    return said.getvalue()


def _verbs(text: str) -> list[str]:
    """Return the verbs in a help: the list under its positional arguments."""
    _, _, after = text.partition("positional arguments:\n")
    section = after.partition("\n\n")[0]
    return [match[1] for line in section.splitlines() if (match := _VERB.match(line))]


def choices(placeholder: str) -> list[str]:
    """Return the values that a placeholder such as {a,b}, a|b or true|false lists; none for FILE."""
    inner = placeholder.partition(" ")[0].strip("{[]}")
    separator = "," if placeholder.startswith("{") or ("," in inner and "|" not in inner) else "|"
    values = inner.split(separator)
    return values if len(values) > 1 and all(re.fullmatch(r"[\w.-]+", value) for value in values) else []
