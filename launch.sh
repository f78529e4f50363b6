#!/usr/bin/env bash
# One-command start on Linux; launch.bat does the same on Windows. `./launch.sh help` lists the commands.
set -euo pipefail
unset PYTHONHOME PYTHONPATH  # packages of another Python must not reach ours

here=$(cd -P -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd)
venv=$here/.venv
python=$venv/bin/python

say() { printf '%s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

help() {
    cat <<'TEXT'
./launch.sh                           open the web page (options such as --share are passed on)
./launch.sh demo                      lip-sync the bundled example to outputs/demo.mp4
./launch.sh sync VIDEO AUDIO -o OUT   lip-sync two files; all options: ./launch.sh sync --help
./launch.sh test                      check the code: ruff, mypy and pytest (options are passed on to pytest)
./launch.sh help                      show this text

The first start creates the folder .venv beside this script and installs the packages into it.
PYTHON=/path/to/python ./launch.sh …  names the Python (3.10 to 3.13) to create it with.
LATENTSYNC_TORCH=cpu ./launch.sh …    names the build of torch to install (default, cpu, cu126), else the GPU decides.
TEXT
}

# Prints the first Python that is recent enough and able to create a virtual environment.
find_python() {
    local candidate without_venv=""
    local probe='
import sys
if (3, 10) <= sys.version_info[:2] <= (3, 13) and sys.maxsize > 2**32:
    try:
        import ensurepip, venv
        print("usable")
    except ImportError:
        print("no venv")'
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3.13 python3.12 python3.11 python3.10 python3 python
    fi
    for candidate; do
        case $("$candidate" -c "$probe" 2>/dev/null || true) in  # being on the PATH does not mean that it runs
            usable) printf '%s\n' "$candidate"; return ;;
            "no venv") without_venv=${without_venv:-$candidate} ;;
        esac
    done
    if [ -n "$without_venv" ]; then
        fail "$without_venv cannot create virtual environments: install its venv module (Debian, Ubuntu: sudo apt install python3-venv)."
    elif [ -n "${PYTHON:-}" ]; then
        fail "PYTHON=$PYTHON is not a 64-bit Python 3.10 to 3.13: name another one, or unset PYTHON."
    else
        fail "No 64-bit Python 3.10 to 3.13 was found: install one (Debian, Ubuntu: sudo apt install python3 python3-venv), or name it with PYTHON=/path/to/python."
    fi
}

# OpenCV and MediaPipe link against these; their packages do not bring them.
check_system_libraries() {
    local missing
    missing=$("$python" -c '
import ctypes, sys
packages = {"libGL.so.1": "libgl1", "libEGL.so.1": "libegl1", "libGLESv2.so.2": "libgles2",
            "libgthread-2.0.so.0": "libglib2.0-0"}
for library, package in packages.items() if sys.platform == "linux" else ():
    try:
        ctypes.CDLL(library)
    except OSError:
        print(package, end=" ")')
    if [ -n "$missing" ]; then
        fail "System libraries are missing: install them with: sudo apt install ${missing% } (package names of Debian and Ubuntu)."
    fi
}

# Reads what `pip --progress-bar raw` prints; shows the file under way, on one line, where there is a terminal.
show_progress() {
    local verb first of total name=""
    while read -r verb first of total _; do
        [ -t 2 ] || continue
        case $verb:$of:$total in
            Downloading:*) name=${first##*/} ;;
            Progress:of:*[!0-9]* | Progress:of:) ;;
            Progress:of:*) printf '\r\033[K  %.60s  %d of %d MB' "$name" $((first / 1000000)) $((total / 1000000)) >&2 ;;
            Installing:*) printf '\r\033[K  unpacking' >&2 ;;
        esac
    done
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

fail_install() {
    fail "Installing the packages failed (the reason is above): check the network and the free disk space, then start again."
}

# The build of torch that suits this machine, the one that is installed (or `none`), and the reason.
choose_torch() { "$python" -I "$here/optim/torch_build.py"; }

# install_torch BUILD PRESENT: that build of the pinned torch, in place of the one that is present.
install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' "$here/requirements.exact.txt")
    # Builds differ in their local version alone, which `torch==2.13.0` does not look at.
    if [ "$2" != none ] && [ "$2" != "$1" ]; then
        "$python" -m pip uninstall --quiet --yes --disable-pip-version-check torch || fail_install
    fi
    # The default build comes with the other packages, from the configured index. Only pytorch.org has the others: it
    # is asked for torch alone, besides the configured index.
    if [ "$1" != default ]; then
        "$python" -m pip install --no-input --disable-pip-version-check --progress-bar raw --no-deps \
            --extra-index-url "https://download.pytorch.org/whl/$1" "torch==$version+$1" | show_progress ||
            say "torch's $1 build cannot be had (the reason is above): the default build is installed instead, which may not use the GPU."
    fi
}

# contents LIST TORCH: what a record says when the packages of LIST are installed here for this Python, with that torch.
contents() {
    "$python" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null &&
        printf '%s\n' "torch: $2" "project: $here" && cat -- "$1"
}

# install LIST NAME: the packages of LIST into .venv, unless .venv/NAME records that exactly these were installed.
install() {
    local record=$venv/$2 torch build present reason
    torch=$(choose_torch 2>/dev/null || true)  # nothing where there is no .venv yet, or a broken one
    if [ -n "$torch" ] && [ -f "$record" ] && [ "$(cat -- "$record")" = "$(contents "$1" "${torch%% *}")" ]; then
        return
    fi
    if ! "$python" -c 'import pip' 2>/dev/null; then  # not there, half made, or its Python was removed
        local base
        base=$(find_python)
        say "Creating .venv with $("$base" -V) …"
        "$base" -m venv --clear -- "$venv" || fail "Could not create $venv (the reason is above)."
    fi
    torch=$(choose_torch) || exit 2
    read -r build present reason <<<"$torch"
    check_system_libraries
    rm -f -- "$record"
    say "Installing the packages of ${1#"$here"/} into .venv (only needed once) …"
    "$python" -m pip install --quiet --no-input --disable-pip-version-check 'pip>=24.1' || fail_install
    if [ "$2" = installed ]; then
        say "torch: the $build build, as $reason."
        install_torch "$build" "$present"
        # First the pinned packages, by their hashes; pip wants hashes of either all packages or none, so what those
        # need follows in a call of its own.
        "$python" -m pip install --no-input --disable-pip-version-check --progress-bar raw --no-deps --require-hashes \
            -r "$here/requirements.hashes.txt" | show_progress || fail_install
    fi
    "$python" -m pip install --no-input --disable-pip-version-check --progress-bar raw -r "$1" | show_progress ||
        fail_install
    if [ "$2" = installed ]; then  # the command `latentsync`, which runs the code in this folder
        "$python" -m pip install -qq --no-input --disable-pip-version-check --no-deps -e "$here" || fail_install
    fi
    # Written last: after an interruption it is missing and the next start installs again.
    contents "$1" "$build" >"$record"
}

# Several GPUs take packages that one does not: installed when an option first asks for them.
install_cluster() {
    local argument
    for argument; do
        case $argument in
            --) return ;;
            --gpus | --gpus=* | --cluster | --cluster=*)
                install "$here/requirements.cluster.txt" installed-cluster
                return
                ;;
        esac
    done
}

# Two runs of pytest: Triton settles at its import whether it interprets, so the kernels have a run of their own.
# Options go to both; a run that has none of the tests that they select (exit code 5) is no failure unless both have none.
run_tests() {
    local first=0 second=0
    "$python" -m pytest -n logical --maxprocesses 4 --dist loadfile "$@" || first=$?
    say $'\n'"The fused kernels, in Triton's interpreter:"
    TRITON_INTERPRET=1 "$python" -m pytest -n logical --maxprocesses 4 "$@" || second=$?
    if [ $first = 5 ] && [ $second != 5 ]; then first=0; fi
    if [ $second = 5 ] && [ $first != 5 ]; then second=0; fi
    say "Tests: exit code $first; kernels: exit code $second."
    if [ $first != 0 ]; then return $first; fi
    return $second
}

command=${1:-}
case $command in
    help | -h | --help)
        help
        ;;
    "" | -*)
        install "$here/requirements.exact.txt" installed
        install_cluster "$@"
        exec "$python" "$here/app.py" "$@"
        ;;
    sync)
        shift
        install "$here/requirements.exact.txt" installed
        install_cluster "$@"
        exec "$venv/bin/latentsync" sync "$@"
        ;;
    demo)
        shift
        install "$here/requirements.exact.txt" installed
        install_cluster "$@"
        mkdir -p -- "$here/outputs"
        "$venv/bin/latentsync" sync "$here/assets/example/face.mp4" "$here/assets/example/speech.wav" \
            -o "$here/outputs/demo.mp4" --model demo "$@"
        say "The lip-synced example is $here/outputs/demo.mp4"
        ;;
    test)
        shift
        install "$here/requirements.exact.txt" installed
        install "$here/requirements.cluster.txt" installed-cluster
        install "$here/tests/requirements.txt" installed-tests
        cd -- "$here"
        "$python" -m ruff check .
        "$python" -m ruff format --check .
        "$python" -m mypy
        run_tests "$@"
        ;;
    *)
        fail "Unknown command: $command (./launch.sh help lists the commands)."
        ;;
esac
