#!/usr/bin/env bash
# Checks what is here by the tools made for it: deploy/check.sh [BIN], of which BIN is a
# folder of tools. Those that are not installed it names; that is no failure.
set -uo pipefail
cd "$(dirname "$0")"
PATH="${1:+$1:}$PATH"
failures=0

# tool, what it looks at, and the command
check() {
  local tool=$1 what=$2
  shift 2
  if ! command -v "$tool" >/dev/null; then
    printf '%-20s %-44s not run: not installed\n' "$tool" "$what"
  elif output=$("$@" 2>&1); then
    printf '%-20s %-44s ok\n' "$tool" "$what"
  else
    printf '%-20s %-44s FAILED\n%s\n' "$tool" "$what" "$output"
    failures=$((failures + 1))
  fi
}

# The unit with commands that are here: its own are where it will be installed.
unit() {
  local folder
  folder=$(mktemp -d) || return
  sed "s|^ExecStart=.*|ExecStart=/bin/true|; s|^User=.*|User=daemon|; s|^Group=.*|Group=daemon|" \
    systemd/jacserve.service >"$folder/jacserve.service"
  if (($#)); then
    mkdir "$folder/jacserve.service.d" && cp "$@" "$folder/jacserve.service.d/"
  fi
  local complaints
  complaints=$(systemd-analyze verify --man=no "$folder/jacserve.service" 2>&1 | grep -F jacserve)
  echo "$complaints"
  rm -r "$folder"
  [[ -z $complaints ]]
}

exposure() {
  local folder
  folder=$(mktemp -d) || return
  cp systemd/jacserve.service "$folder/"
  systemd-analyze security --offline=yes --threshold=20 "$folder/jacserve.service"
  local status=$?
  rm -r "$folder"
  return $status
}

manifests() {
  local folder
  folder=$(mktemp -d) || return
  kubectl kustomize "$1" >"$folder/all.yaml" &&
    kubernetes-validate --strict --kubernetes-version 1.33 "$folder/all.yaml"
  local status=$?
  rm -r "$folder"
  return $status
}

# The overlay with TLS: a component needs something to be part of.
with_tls() {
  local folder
  folder=$(mktemp -d) || return
  cp -r kubernetes/. "$folder/" && mkdir "$folder/whole" &&
    printf 'resources: [../base]\ncomponents: [../tls]\n' >"$folder/whole/kustomization.yaml" &&
    manifests "$folder/whole"
  local status=$?
  rm -r "$folder"
  return $status
}

check systemd-analyze "systemd/jacserve.service" unit
check systemd-analyze "systemd/gpu.conf" unit systemd/gpu.conf
check systemd-analyze "exposure of at most 2.0" exposure
check hadolint "Dockerfile" hadolint Dockerfile
for tool in kubectl kubernetes-validate; do
  command -v "$tool" >/dev/null || missing=$tool
done
check "${missing:-kubernetes-validate}" "kubernetes/base" manifests kubernetes/base
check "${missing:-kubernetes-validate}" "kubernetes/cuda" manifests kubernetes/cuda
check "${missing:-kubernetes-validate}" "kubernetes/base with kubernetes/tls" with_tls
check kubeconform "kubernetes/base" bash -c 'kubectl kustomize kubernetes/base | kubeconform -strict'
if [[ ${BUILD_IMAGES:-} ]]; then
  for target in cpu cuda; do
    check buildah "Dockerfile, --target $target" buildah build -f Dockerfile --target "$target" ..
  done
else
  echo "The images were not built; with BUILD_IMAGES=1 buildah tries, which needs a network."
fi
exit $((failures > 0))
