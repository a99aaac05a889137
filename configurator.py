"""
Plain-globals configuration, for any script whose settings are its own module globals:

    learning_rate = 1e-3  # a setting is a global int, float, bool or str; --help shows this comment
    from configurator import configure, within
    configure(globals())  # python train.py config/sm.py other.py --learning_rate=3e-4
    within(globals(), learning_rate=(0, 100))

Config files are Python and run in the order given; they see the settings so far, so
`warmup = 2 * warmup` works. Flags come last, wherever they stand. An unknown key, a wrong type,
a value out of bounds or a missing file is one line on stderr and exit status 2.
"""
import ast
import difflib
import inspect
import os
import re
import signal
import sys
from glob import glob

TYPES = (bool, int, float, str)
LONGEST = 100  # characters of a number or a bool on the command line
COMMENT = re.compile(r"^(?:(\w+)|    (\w+): \w+) = [^#\n]*# (.+)$", re.M)  # of a global, of a field


def on_signals(handler):
    """Call `handler` on Ctrl-C and SIGTERM, and on SIGHUP unless nohup has it ignored."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handler)


def end_on_signals():
    """From here on signals end the process with a line, even in an import: a script's first act."""
    def end(number, frame):
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    on_signals(end)


def die(message, status=1):
    """Print one line on stderr and exit with `status`: every error a user can cause ends here."""
    print(f"error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    sys.exit(status)


def setting_names(namespace):
    """A script's settings: its bool, int, float and str globals in lower case, not _private."""
    return [k for k, v in namespace.items() if type(v) in TYPES and k.islower() and k[0] != "_"]


def one_of(settings, show=str, **allowed):
    """Die with status 2 unless settings[key] is one of allowed[key], which `show` writes out."""
    for key, values in allowed.items():
        if settings[key] not in values:
            listed = ", ".join(map(show, values))
            die(f"{key} must be one of {listed}, and is {settings[key]!r}", 2)


def within(settings, **ranges):
    """Die with status 2 unless least <= settings[key] <= most, for each key=(least, most)."""
    for key, (least, most) in ranges.items():
        if not least <= settings[key] <= most:  # NaN isn't within anything
            die(f"{key} must be at least {least} and at most {most}, and is {settings[key]}", 2)


def nearest(word, words, otherwise):
    """The words ", did you mean ...?" with the nearest of `words`, or `otherwise`."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else otherwise


def cast(key, value, default, where):
    """`value` as the type of `default`, or die. An int is a fine float, and 1e3 a fine int."""
    kind = type(default)
    if type(value) is kind:
        return value
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    die(f"{where}: {key} must be {kind.__name__}, like {default!r}, and is {value!r}", 2)


def typed(values, known, where):
    """`values`, each as the type it has in `known`; dies on a key that isn't there."""
    for key in values:
        if key not in known:
            hint = nearest(str(key), known, "; --help lists the keys")
            die(f"{where}: unknown key {key!r}{hint}", 2)
    return {key: cast(key, value, known[key], where) for key, value in values.items()}


def parse(text, default):
    """The value a flag's text stands for: strings as they are, all else as Python writes it."""
    if isinstance(default, str) or len(text) > LONGEST:
        return text
    try:
        return ast.literal_eval(text)
    except Exception:  # literal_eval raises whatever the text makes Python raise
        return text  # left a str, so that cast() names the type it should have had


def run_file(path, settings):
    """What the config file at `path` assigns, seeing `settings`; dies if it can't be run."""
    if os.path.isdir(path):
        die(f"{path!r} is a folder: name one of its files", 2)
    if not os.path.isfile(path):
        files = glob(os.path.join(os.path.dirname(path), "*.py")) + glob("config/*.py")
        there = os.path.join("config", path.removesuffix(".py") + ".py")
        hint = nearest(there if there in files else path, files,
                       "; settings are written --key=value")
        die(f"no config file {path!r}{hint}", 2)
    assigned = {}
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), dict(settings), assigned)
    except (Exception, SystemExit) as e:
        die(f"{path}: {type(e).__name__}: {e}", 2)
    return {key: value for key, value in assigned.items() if key[0] != "_"}


def show_help(settings, fields_of):
    """Print the script's docstring, then each setting with its default and its comment."""
    source = inspect.getsource(fields_of) if fields_of else ""
    if "__file__" in settings:
        with open(settings["__file__"], encoding="utf-8") as file:
            source = file.read() + source
    comments = {}
    for key, field, comment in COMMENT.findall(source):
        comments.setdefault(key or field, comment)
    print((settings.get("__doc__") or "").strip() + "\n\nsettings and their defaults:")
    for key in setting_names(settings):
        print(f"  --{key}={settings[key]}".ljust(34), comments.get(key, ""))


def configure(settings, argv=None, fields_of=None):
    """
    Override `settings`, a script's globals(), in place from `argv` (sys.argv[1:] if None).

    fields_of: a dataclass whose fields are settings too, for their comments. Returns the dict of
    the keys that were set explicitly. Exits with a line and status 2 on an unknown key, a wrong
    type, a missing or broken file; with status 0 after --help.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a "?" where the terminal lacks a character
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        show_help(settings, fields_of)
        sys.exit(0)
    known = {key: settings[key] for key in setting_names(settings)}
    flags = [argument for argument in argv if argument.startswith("-")]
    for flag in flags:
        if not flag.startswith("--") or "=" not in flag:
            die(f"{flag!r}: settings are written --key=value", 2)
    given = {}
    for path in argv:
        if path not in flags:
            given |= typed(run_file(path, known | given), known, path)
    for flag in flags:
        key, _, text = flag[2:].partition("=")
        given |= typed({key: parse(text, known.get(key))}, known, "command line")
    settings.update(given)
    return given
