"""The command `latentsync`: one name for every command line of the project.

latentsync sync VIDEO AUDIO -o OUT.mp4
latentsync serve
"""

import importlib
import sys

# What a user types: the module whose `main` does it, and what --help says of it.
COMMANDS = {
    "sync": ("optim.__main__", "make the mouth in a video say the words of a recording"),
    "batch": ("optim.batch", "work through a list of such jobs"),
    "prepare": ("latentsync.prepared.__main__", "follow and encode the face of a film, once for every voice to come"),
    "serve": ("app", "open the page in the browser"),
    "models": ("latentsync.checkpoints.__main__", "list, fetch, verify and remove the released models"),
    "doctor": ("optim.doctor", "look at this machine and say what would make it faster"),
    "benchmark": ("optim.benchmark.__main__", "measure the speed of the levels on this machine"),
    "quality": ("optim.quality", "measure what the levels cost in quality"),
    "evaluate": ("optim.evaluation", "measure lip sync on clips whose words are known"),
    "train": ("latentsync.training.__main__", "train the demo model"),
}


def usage() -> str:
    lines = [f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: latentsync COMMAND …", "", *lines, "", "latentsync COMMAND --help lists its options."])


def main() -> int:
    """Run the command that the first argument names; returns the exit code."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may have letters that the console lacks
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(usage())
        return 0
    if command not in COMMANDS:
        print(f"There is no command '{command}'.\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[command][0])
    return module.main(arguments, prog=f"latentsync {command}")
