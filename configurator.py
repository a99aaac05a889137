"""
Plain-globals configuration, for any script whose settings are its own module globals:

    learning_rate = 1e-3            # a setting is a global int, float, bool or str, with a comment
    from configurator import configure
    configure(globals())            # python train.py config/sm.py other.py --learning_rate=3e-4

Config files are Python and run in the order given; they see the settings so far, so
`warmup = 2 * warmup` works. Flags come last, wherever they stand. An unknown key, a wrong type or a
missing file is one line on stderr and exit status 2, before anything has started.
"""
import ast
import difflib
import os
import signal
import sys

TYPES = (bool, int, float, str)


def setting_names(namespace):
    """The settings among a script's globals: every bool, int, float or str in lower case; CONSTANTS and _private names aren't."""
    return [k for k, v in namespace.items() if type(v) in TYPES and k.islower() and not k.startswith("_")]


def die(message, status=1):
    """Print one line on stderr and exit with `status`: every error a user can cause ends here."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def end_on_signals():
    """From here on Ctrl-C, SIGTERM and SIGHUP end the process with one line, even within an import. A script calls it first."""
    def end(number, frame):
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


def one_of(settings, show=str, **allowed):
    """Exit with status 2 and a line unless, for each key, settings[key] is one of allowed[key]. show: how the line writes those."""
    for key, values in allowed.items():
        if settings[key] not in values:
            die(f"{key} must be one of {', '.join(map(show, values))}, and is {settings[key]!r}", 2)


def cast(key, value, default, where):
    """`value` as the type of `default`, or die. An int is a fine float, and 1e3 a fine int."""
    kind = type(default)
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    die(f"{where}: {key} must be {kind.__name__}, like {default!r}, and is {value!r}", 2)


def parse(text, default):
    """The value a flag's text stands for: strings as they are, everything else as Python writes it."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except Exception:  # literal_eval raises whatever the text makes Python raise
        return text  # left a str, so that cast() names the type it should have had


def configure(settings, argv=None):
    """
    Override `settings` (a script's globals()) in place from `argv` (sys.argv[1:] if None).

    Returns the dict of the keys that were set explicitly. Exits with status 2 and one line on an unknown
    key, a wrong type, a missing or broken file; with status 0 after --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = {k: settings[k] for k in setting_names(settings)}
    given = {}

    def put(key, value, where):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            die(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "; --help lists the keys"), 2)
        given[key] = cast(key, value, known[key], where)

    if "--help" in argv or "-h" in argv:
        print((settings.get("__doc__") or "").strip() + "\n\nsettings and their defaults:")
        print("\n".join(f"  --{k}={v}" for k, v in known.items()))
        sys.exit(0)
    flags, paths = [a for a in argv if a.startswith("-")], [a for a in argv if not a.startswith("-")]
    for flag in flags:
        if not flag.startswith("--") or "=" not in flag:
            die(f"{flag!r}: settings are written --key=value", 2)
    for path in paths:
        if not os.path.isfile(path):
            folder = os.path.dirname(path) or "."
            near = difflib.get_close_matches(os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else [], n=1)
            die(f"no config file {path!r}" + (f", did you mean {os.path.join(folder, near[0])!r}?" if near else
                                              "; settings are written --key=value"), 2)
        assigned = {}
        try:
            with open(path, encoding="utf-8") as f:
                exec(compile(f.read(), path, "exec"), {**known, **given}, assigned)
        except Exception as e:
            die(f"{path}: {type(e).__name__}: {e}", 2)
        for key, value in assigned.items():
            if not key.startswith("_"):
                put(key, value, path)
    for flag in flags:
        key, _, text = flag[2:].partition("=")
        put(key, parse(text, known.get(key, "")), "command line")
    settings.update(given)
    return given
