#!/usr/bin/env bash
# Makes .venv and installs entrl in it with the versions of constraints.txt. A second call finds the stamp and does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

wanted=$(cat pyproject.toml constraints.txt hatch_build.py scripts/setup.sh | cksum)
stamp=.venv/entrl-stamp
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted|$PWD" ] && [ -x .venv/bin/entrl ]; then exit 0; fi

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
find_python() {
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is not found. Give a Python >= 3.11."
    fits "$PYTHON" || die "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1). entrl needs Python >= 3.11."
    echo "$PYTHON"; return
  fi
  for candidate in python3 python3.11 python3.12 python3.13 python; do
    if command -v "$candidate" >/dev/null && fits "$candidate"; then echo "$candidate"; return; fi
  done
  die "no Python >= 3.11 found (python3 is $(python3 --version 2>&1 || echo missing)). Install one, or name it: PYTHON=/path/to/python3.12 make setup"
}
python=$(find_python)

need=${ENTRL_SETUP_GIB:-4}   # CPU build of torch: 2 GiB installed and its download; the CUDA build takes about 8
free=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
[ "$free" -ge "$need" ] || die "only $free GiB are free in $PWD; the set-up needs about $need GiB. Free some space, or clone to a larger disk."

echo "setup: installing into .venv with $("$python" --version 2>&1); a few minutes, mostly torch"
rm -f "$stamp"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1 || ! fits .venv/bin/python; then
  rm -rf .venv
  "$python" -m venv .venv 2>.venv-error || { cat .venv-error >&2; rm -rf .venv-error .venv; die "$python cannot make a virtual environment. On Debian: apt install python3-venv."; }
  rm -f .venv-error
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
  .venv/bin/python -m pip install --quiet --no-input "$@" >"$log" 2>&1 && return
  grep -v 'is ignored: it is neither' "$log" | tail -n 15 >&2
  grep -q 'No space left' "$log" && die "the disk is full. Free some space and run make setup again; it continues."
  die "pip could not install the packages; its last words are above. Run make setup again; it continues."
}
install --upgrade pip
install -c constraints.txt -e '.[dev]'
printf '%s|%s' "$wanted" "$PWD" >"$stamp"
echo "setup: done, $(du -sh .venv | cut -f1) in .venv"
