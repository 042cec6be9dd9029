#!/usr/bin/env bash
# Installs gog_edge on a Jetson, into a virtual environment that includes JetPack's TensorRT. Not tested on a Jetson: see
# jetson/README.md. It can be run repeatedly: an existing environment is kept and updated.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash jetson/install.sh [--venv DIR] [--wheels DIR] [--cpu] [--python FILE] [--dry-run]

  --venv DIR     the virtual environment to create or update (default: ~/gog_edge)
  --wheels DIR   install only from the wheels in this folder, without a network
  --cpu          serve on the CPU; requires no TensorRT, and any Python from 3.11 on
  --python FILE  the interpreter (default: /usr/bin/python3, for which JetPack's TensorRT is built)
  --dry-run      run the checks and print the commands without running them
  --root DIR     read /etc and /proc below this folder (for tests)

JetPack 7: Jetson Linux 38 on Thor, 39 on Thor and Orin.
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$HOME/gog_edge wheels='' python=/usr/bin/python3 root='' cpu=no dry=no

while (($#)); do
  case $1 in
    --venv | --wheels | --python | --root)
      (($# > 1)) || { echo "$1 needs a value; see --help" >&2; exit 2; }
      declare "${1#--}=$2"
      shift 2
      ;;
    --cpu) cpu=yes; shift ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown option '$1'; see --help" >&2; exit 2 ;;
  esac
done

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ $dry == yes ]] || "$@"
}

# The first line is "# R39 (release), REVISION: 2.1, GCID: ...": Jetson Linux 39.2.1.
check_release() {
  local file=$root/etc/nv_tegra_release line=''
  [[ -r $file ]] || fail "'$file' does not exist, so this is not a Jetson; on a PC: pip install 'gog_edge[tensorrt-rtx]'"
  read -r line <"$file" || true
  [[ $line =~ ^#\ R([0-9]+)\ \(release\),\ REVISION:\ ([0-9]+)([0-9.]*) ]] ||
    fail "the first line of '$file' must name a release of Jetson Linux, got '$line'"
  linux=${BASH_REMATCH[1]}
  echo "Jetson Linux $linux.${BASH_REMATCH[2]}${BASH_REMATCH[3]} on $(board)"
  case $linux in
    36) fail 'JetPack 6 is not supported; install JetPack 7.2, which supports Orin' ;;
    38 | 39) ;;
    *) fail "Jetson Linux $linux is not JetPack 7 (38, 39); flash JetPack 7.2 with NVIDIA's SDK Manager" ;;
  esac
}

board() {
  local model=$root/proc/device-tree/model
  if [[ -r $model ]]; then tr -d '\0' <"$model"; else echo 'an unknown board'; fi
}

# The minimum version of Python is read from pyproject.toml.
check_python() {
  local oldest
  oldest=$(sed -nE 's/^requires-python = ">=3\.([0-9]+)"$/\1/p' "$here/../pyproject.toml")
  version=$("$python" -c 'import sys; print(sys.version_info[1])') || fail "'$python' cannot be run; choose another with --python FILE"
  echo "Python 3.$version ($python)"
  ((version >= oldest)) || fail "Python 3.$oldest or later is required; install one and select it with --python FILE"
}

check_tensorrt() {
  local version
  version=$("$python" -c 'import tensorrt; print(tensorrt.__version__)' 2>/dev/null) ||
    fail "'$python' cannot import tensorrt; run: sudo apt install nvidia-jetpack"
  echo "TensorRT $version"
}

install_packages() {
  local source=("$here/..[cpu]") from=()
  if [[ -n $wheels ]]; then
    compgen -G "$wheels/gog_edge-*-any.whl" >/dev/null ||
      fail "'$wheels' must contain gog_edge-*-any.whl, a wheel for any processor; see jetson/README.md"
    source=('gog_edge[cpu]') from=(--no-index --find-links "$wheels")
  fi
  # Bindings of JetPack's CUDA major version; onnx, because engines are built on the machine that runs them.
  [[ $cpu == yes ]] || source+=('cuda-bindings>=13,<14' 'onnx>=1.19')
  run "$venv/bin/python" -m pip install "${from[@]}" "${source[@]}"
}

check_release
check_python
[[ $cpu == yes ]] || check_tensorrt

if [[ ! -x $venv/bin/python ]]; then
  # JetPack's TensorRT is a package of the system's Python, which the environment must include.
  system=(--system-site-packages)
  [[ $cpu == yes ]] && system=()
  run "$python" -m venv "${system[@]}" "$venv"
fi
install_packages

engine=$([[ $cpu == yes ]] && echo ort || echo tensorrt)
run "$venv/bin/gog-edge" doctor --engine "$engine" || true # prints what is still missing
echo
echo "Next steps:"
[[ $cpu == yes ]] || echo "  $venv/bin/gog-edge export engines BUNDLE --engine tensorrt"
echo "  $venv/bin/gog-edge doctor --bundle BUNDLE --engine $engine"
echo "  $venv/bin/gog-edge serve --bundle BUNDLE --engine $engine"
