# Sourced by quickstart and the tests: make a virtual environment, $venv or .venv, with a supported Python and put it
# first on the PATH. On Windows the shell is Git Bash.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${venv:-.venv}
case $(uname -s) in
    MINGW* | MSYS*) programs=$venv/Scripts ;;
    *) programs=$venv/bin ;;
esac

if [ ! -x "$programs/python" ]; then
    for python in python3 python3.13 python3.12 python3.11 python; do
        if "$python" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            "$python" -m venv "$venv" && break
        fi
    done
fi
[ -x "$programs/python" ] || { echo "error: Python 3.11, 3.12 or 3.13 with venv is needed" >&2; exit 2; }
export PATH="$PWD/$programs:$PATH"
