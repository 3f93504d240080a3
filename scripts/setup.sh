#!/usr/bin/env bash
# Makes .venv with all that Muster, its demo and its tests need. Quick when nothing changed. `make setup` calls it.
#
# Installs from apt what is missing (Debian, Ubuntu; as root or with sudo). It starts and stops no service: the demo and
# the tests run a mosquitto of their own on a free port.
# Exit codes: 0 ready, 1 an installation failed (the log is named), 2 this machine lacks something you must install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
EXTRAS=train,coordinator,cli,systemd,demo,dev
CONSTRAINTS=constraints/py311.txt
STAMP=$VENV/.muster-setup
LOG=$VENV/setup.log
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*"; }
stop() { local code=$1; shift; printf 'setup: %s\n' "$@" >&2; exit "$code"; }

# ---- the machine -----------------------------------------------------------------------------------------------------

supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# 3.11 first: the pinned versions were tested with it.
find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3.14 python3.10 python3; do
        if command -v "$name" >/dev/null && supported "$name"; then echo "$name"; return; fi
    done
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# Prints the apt packages that are missing, one a line.
missing_packages() {
    local python=$1 version
    [ -n "$python" ] || { echo python3; echo python3-venv; echo python3-dev; }
    if [ -n "$python" ]; then
        version=$(version_of "$python")
        "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
        # systemd-python is built from source: compiler, headers of Python and of libsystemd.
        "$python" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
            || echo "python$version-dev"
    fi
    local PATH=$PATH:/usr/sbin:/sbin
    command -v mosquitto >/dev/null || echo mosquitto
    command -v systemd-analyze >/dev/null || echo systemd
    # Of the tests on real hosts: a Debian tree, what boots it, and the way to it.
    command -v debootstrap >/dev/null || echo debootstrap
    command -v systemd-nspawn >/dev/null || echo systemd-container
    command -v ip >/dev/null || echo iproute2
    command -v ssh-keygen >/dev/null || echo openssh-client
    command -v gcc >/dev/null || { echo gcc; echo libc6-dev; }
    command -v pkg-config >/dev/null || echo pkg-config
    [ -e /usr/include/systemd/sd-daemon.h ] || echo libsystemd-dev
}

install_packages() {
    local packages=("$@") as_root=()
    command -v apt-get >/dev/null || stop 2 \
        "this machine has no apt. Install the counterparts of these Debian packages, then run make again:" \
        "    ${packages[*]}"
    if [ "$(id -u)" != 0 ]; then
        if command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
            as_root=(sudo)
        else
            stop 2 "these packages are missing, and this user may not install them (no root, no sudo without password):" \
                "    ${packages[*]}" \
                "Have them installed, then run make again:  apt-get install ${packages[*]}"
        fi
    fi
    say "installing from apt: ${packages[*]}"
    local log; log=$(mktemp)
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq)
    if ! { "${as_root[@]}" "${apt[@]}" update && "${as_root[@]}" "${apt[@]}" install -y --no-install-recommends "${packages[@]}"; } >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        stop 1 "apt-get failed; the whole log is in $log"
    fi
    rm -f "$log"
}

has_nvidia() { [ -e /proc/driver/nvidia/version ] || [ -e /dev/nvidiactl ] || [ -e /etc/nv_tegra_release ]; }

# ---- the virtual environment -----------------------------------------------------------------------------------------

# pip warns about metadata of packages that are not ours; its words go to the log, and are shown when it fails.
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@" >>"$LOG" 2>&1; }

must_pip() {
    if ! pip "$@"; then
        grep -v '^WARNING' "$LOG" | tail -n 20 >&2
        stop 1 "pip failed; the whole log is in $LOG"
    fi
}

wanted_torch() {
    if [ "${#PINS[@]}" -gt 0 ]; then grep -E '^torch==' "$CONSTRAINTS"; else echo 'torch>=2.4'; fi
}

reachable() {
    "$VENV/bin/python" - "$1" <<'PY' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=10).close()
PY
}

# The CPU build carries a local version (+cpu); the plain wheel of Linux x86 brings gigabytes of CUDA libraries.
install_torch() {
    local torch; torch=$(wanted_torch)
    if "$VENV/bin/python" -c 'import torch' 2>/dev/null; then return; fi
    if has_nvidia; then
        say "installing $torch for the NVIDIA driver of this machine (large)"
        must_pip install "$torch"
        return
    fi
    say "installing $torch, CPU build (no NVIDIA driver found)"
    if [[ $torch == *==* ]] && pip install "$torch+cpu"; then return; fi
    if reachable "$TORCH_CPU_INDEX/torch/"; then
        must_pip install --index-url "$TORCH_CPU_INDEX" "$torch"
    else
        say "the index of CPU builds can't be reached: taking the default wheel"
        must_pip install "$torch"
    fi
}

# The folder is part of it: a virtual environment does not survive being moved.
fingerprint() {
    { pwd -P; version_of "$1"; cat pyproject.toml "$CONSTRAINTS" scripts/setup.sh; } | sha256sum | cut -d' ' -f1
}

# In another user's clone there is nothing to be made, and nothing to be removed.
may_write() {
    if [ ! -w . ] || { [ -e "$VENV" ] && [ ! -w "$VENV" ]; }; then
        stop 2 "$PWD/$VENV is not up to date, and $(id -un) may not write there (it belongs to $(stat -c %U .)):" \
            "    clone the repository to a folder of your own, and run make there"
    fi
}

make_venv() {
    local python=$1
    if [ -e "$VENV" ] && { ! supported "$VENV/bin/python" || [ "$(cat "$VENV/.muster-home" 2>/dev/null || pwd -P)" != "$(pwd -P)" ]; }; then
        say "$VENV is of another folder or an unsupported Python: making it anew"
        rm -rf "$VENV"
    fi
    if ! [ -x "$VENV/bin/python" ]; then
        say "making $VENV with $("$python" --version)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    pwd -P >"$VENV/.muster-home"
}

main() {
    local python missing
    python=$(find_python)
    mapfile -t missing < <(missing_packages "$python")
    if [ "${#missing[@]}" -gt 0 ]; then
        install_packages "${missing[@]}"
        python=$(find_python)
        [ -n "$python" ] || stop 2 "no Python >= 3.10 on this machine, and its apt has none: install one, then run make again"
    fi
    if [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint "$VENV/bin/python" 2>/dev/null)" ]; then
        say "$VENV is up to date"
        return
    fi
    may_write
    make_venv "$python"
    : >"$LOG"
    PINS=()
    if [ "$(version_of "$VENV/bin/python")" = 3.11 ]; then
        PINS=(-c "$CONSTRAINTS")
    else
        say "the pinned versions of $CONSTRAINTS are for Python 3.11; with $(version_of "$VENV/bin/python") the newest allowed ones are taken"
    fi
    install_torch
    say "installing Muster and its extras: $EXTRAS"
    must_pip install "${PINS[@]}" -e ".[$EXTRAS]"
    fingerprint "$VENV/bin/python" >"$STAMP"
    say "done: $VENV has $("$VENV/bin/python" --version), torch $("$VENV/bin/python" -c 'import torch; print(torch.__version__)')"
}

main
