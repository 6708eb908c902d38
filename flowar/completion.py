"""`flowar completion bash|zsh|fish`: a script that completes verbs, settings and their values. Imports no torch.

The script asks `flowar completion words LINE` for what may stand at the end of a line. Read next: cli.py.
"""

import argparse
import sys

from flowar.cli import JOB_VERBS, VERBS
from flowar.config.explain import Explained, explain
from flowar.config.jobs import ClusterConfig
from flowar.config.models import MODEL_VARIANTS

BASH = r"""_flowar() {
  local IFS=$'\n' current=${COMP_WORDS[COMP_CWORD]} line=${COMP_LINE:0:COMP_POINT} found
  found=$(flowar completion words "$line" 2>/dev/null)
  COMPREPLY=($(compgen -W "$found" -- "${line##* }"))
  if [[ ${line##* } == *=* && $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#*=}"); fi
  if [[ ${line##* } != *=* ]]; then
    COMPREPLY+=($(compgen -f -X '!*.yaml' -- "$current") $(compgen -d -- "$current"))
  fi
  if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
complete -F _flowar flowar
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + BASH
FISH = "complete -c flowar -a '(flowar completion words (commandline -cp | string collect))'\n"
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
CHOICES, FLAG = "one of ", "true or false"  # how kinds.py says which values there are


def completion(words: list[str]) -> None:
    """Print the script for a shell, for example: source <(flowar completion bash)."""
    parser = argparse.ArgumentParser(prog="flowar completion", description=completion.__doc__)
    parser.add_argument("shell", choices=[*SCRIPTS, "words"], help="words: what may stand at the end of LINE")
    parser.add_argument("line", nargs="?", default="", metavar="LINE")
    options = parser.parse_args(words)
    sys.stdout.write(SCRIPTS[options.shell] if options.shell in SCRIPTS else "\n".join(complete(options.line)) + "\n")


def complete(line: str) -> list[str]:
    """Return the words that may stand at the end of a command line, `flowar ...` up to the cursor."""
    *before, current = line.split(" ")
    given = [word for word in before[1:] if word]
    if not given:
        return matching(current, [*VERBS, *JOB_VERBS, "help"])
    if given == ["evaluate"] and "make-reference".startswith(current or "-"):
        return ["make-reference"]
    if given[0] == "submit":
        given = given[1:]
        if not given:
            return matching(current, [name for name, verb in VERBS.items() if verb.folder] + ["pipeline"])
    if given[0] == "help":
        return matching(current, sorted({setting.key for verb in VERBS.values() for setting in explain(verb.schema)}))
    if given[0] == "completion":
        return matching(current, list(SCRIPTS))
    if given[0] not in VERBS:
        return []
    settings = [setting for setting in explain(VERBS[given[0]].schema) if setting.kind]
    if "submit" in before:
        settings += [
            setting._replace(key=f"cluster.{setting.key}") for setting in explain(ClusterConfig) if setting.kind
        ]
    key, is_value, _ = current.partition("=")
    if is_value:
        values = next((values_of(setting) for setting in settings if setting.key == key), [])
        return matching(current, [f"{key}={value}" for value in values])
    flags = ["--dry-run", "--help", *(["--cluster"] if "submit" in before else [])]
    return matching(current, [*(f"{setting.key}=" for setting in settings), *flags])


def values_of(setting: Explained) -> list[str]:
    """Return the values that a setting may have, if they can be listed."""
    if setting.key.rpartition(".")[2] == "variant":
        return list(MODEL_VARIANTS)
    if setting.kind.startswith(FLAG):
        return ["true", "false"]
    kind = setting.kind.removesuffix(", or null")
    return kind.removeprefix(CHOICES).split(", ") if kind.startswith(CHOICES) else []


def matching(beginning: str, words: list[str]) -> list[str]:
    """Return the words with this beginning; of settings in sections, only the sections until one is begun."""
    found = [word for word in words if word.startswith(beginning)]
    if not beginning and len(found) > 40:
        found = list(dict.fromkeys(word.partition(".")[0] + "." if "." in word else word for word in found))
    return found
