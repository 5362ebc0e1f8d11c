# Shared by the scenarios: a region with its servers, a load with its record, the steps of a run.
#
# A scenario brings a region to a steady state, injects, observes, heals, and verifies every
# acknowledged write against the oracle's record. Everything it starts it stops, by process id.
#
#   HOLDFAST_BIN      where the binaries are
#   HOLDFAST_TOOLS    where the test servers are (tools/setup test)
#   CHAOS_OUT         where results are written
#   CHAOS_REGION      a file that is read after this one, to run against a region of your own: it
#                     defines region_start, node_kill, node_start and whatever else a scenario uses
set -euo pipefail
BIN=${HOLDFAST_BIN:-${CARGO_TARGET_DIR:-$HOME/.cache/holdfast/target}/release}
TOOLS=${HOLDFAST_TOOLS:-$HOME/.cache/holdfast/tools}
CHAOS_OUT=${CHAOS_OUT:-chaos-results}
SCENARIO=$(basename "$0" .sh)
DIR=$(mktemp -d)
CLOUD=eu-central-1 PASSWORD=chaos-password
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test-secret-key
declare -A PID=() WRAP=()
STEPS=() BEGAN=$EPOCHREALTIME PASSED=false
mkdir -p "$CHAOS_OUT"

seconds() { awk -v a="$BEGAN" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }'; }
# A line of the run's record.
step() {
  local at; at=$(seconds)
  printf '[%6s s] %s\n' "$at" "$*"
  STEPS+=("{\"at\":$at,\"what\":\"$(printf '%s' "$*" | tr -d '"\\' | tr '\n' ' ')\"}")
}
fail() { step "FAILED: $*"; exit 1; }
# within SECONDS TEXT COMMAND...: the command must succeed in time.
within() {
  local limit=$1 what=$2 until; shift 2
  until=$((SECONDS + limit))
  until "$@" >"$DIR/said" 2>&1; do
    [ $SECONDS -lt $until ] || fail "not within $limit s: $what: $(tail -c 300 "$DIR/said")"
    sleep 0.2
  done
  step "$what"
}
# expect TEXT COMMAND...: the command must succeed now.
expect() { local what=$1; shift; "$@" >"$DIR/said" 2>&1 || fail "$what: $(tail -c 300 "$DIR/said")"; step "$what"; }
not() { ! "$@"; }

end() {
  local code=$? n
  trap - EXIT
  set +e
  [ "$PASSED" = true ] || { code=1; for n in 1 2 3; do tail -n 5 "$DIR/node$n.log"; done 2>/dev/null; }
  for n in "${!PID[@]}"; do kill -CONT "-${PID[$n]}" 2>/dev/null; kill -KILL "-${PID[$n]}" 2>/dev/null; done
  wait 2>/dev/null
  declare -F undo >/dev/null && undo
  printf '{"scenario":"%s","passed":%s,"seconds":%s,"steps":[%s]}\n' "$SCENARIO" "$PASSED" "$(seconds)" \
    "$(IFS=,; echo "${STEPS[*]}")" > "$CHAOS_OUT/$SCENARIO.json"
  [ -n "${CHAOS_KEEP:-}" ] && echo "kept: $DIR" || rm -rf "$DIR"
  exit $code
}
trap end EXIT
done_well() { PASSED=true; step "passed"; }

# start NAME LOG COMMAND...: in a process group of its own.
start() { local name=$1 log=$2; shift 2; setsid "$@" >>"$log" 2>&1 </dev/null & PID[$name]=$!; }
stop() { kill -KILL "-${PID[$1]}" 2>/dev/null || true; wait "${PID[$1]}" 2>/dev/null || true; unset "PID[$1]"; }
signal() { kill "-$1" "-${PID[$2]}"; }
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
answers() { curl -s -o /dev/null --max-time 5 "$1"; }
# s3 METHOD PATH [CURL OPTIONS]: a signed request to the bucket's store.
s3() {
  local method=$1 path=$2; shift 2
  curl -sS --fail --max-time 20 -X "$method" --aws-sigv4 "aws:amz:$CLOUD:s3" --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" \
    -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' -H 'Content-Type: application/xml' "$@" "$S3/$path"
}
made_bucket() {
  s3 PUT holdfast --data-binary "<CreateBucketConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><LocationConstraint>$CLOUD</LocationConstraint></CreateBucketConfiguration>"
}
minio_run() {
  MINIO_ROOT_USER=$AWS_ACCESS_KEY_ID MINIO_ROOT_PASSWORD=$AWS_SECRET_ACCESS_KEY MINIO_REGION=$CLOUD \
    start minio "$DIR/minio.log" "$TOOLS/bin/minio" server --quiet --address "${S3#http://}" --console-address "127.0.0.1:$(free_port)" "$DIR/minio"
}
minio_start() {
  S3=http://127.0.0.1:$(free_port)
  minio_run
  within 30 "MinIO listens" answers "$S3/minio/health/live"
  within 10 "there is a bucket" made_bucket
}
localstack_start() {
  local port; port=$(free_port)
  LOCALSTACK=http://127.0.0.1:$port
  SERVICES=s3,kms GATEWAY_LISTEN=127.0.0.1:$port EAGER_SERVICE_LOADING=1 LOCALSTACK_VOLUME_DIR=$DIR/volume TMPDIR=$DIR \
    DNS_ADDRESS=0 DISABLE_EVENTS=1 SKIP_SSL_CERT_DOWNLOAD=1 start localstack "$DIR/localstack.log" "$TOOLS/bin/localstack-supervisor"
  within 120 "LocalStack listens" answers "$LOCALSTACK/_localstack/health"
}
# kms ACTION JSON: asks LocalStack's KMS, which checks no signature.
kms() {
  curl -sS --fail --max-time 10 -H "X-Amz-Target: TrentService.$1" -H 'Content-Type: application/x-amz-json-1.1' -d "$2" \
    -H "Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/$CLOUD/kms/aws4_request, SignedHeaders=host, Signature=0" "$LOCALSTACK/"
}
# proxy_start: what stands in $DIR/mode becomes of requests to the bucket.
proxy_start() {
  echo pass > "$DIR/mode"
  start proxy "$DIR/proxy.log" "$BIN/proxy" "$S3" "$DIR/mode"
  within 10 "a proxy stands before the bucket" test -s "$DIR/proxy.log"
  BUCKET=$(head -1 "$DIR/proxy.log")
}

# flip FILE OFFSET: one bit of that byte.
flip() {
  local byte; byte=$(od -An -tu1 -j "$2" -N 1 "$1")
  printf "\\x$(printf %02x $((byte ^ 1)))" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}

hf() { timeout 120 "$BIN/holdfast" --config "$DIR/operator.toml" "$@"; }
node_start() { start "node$1" "$DIR/node$1.log" ${WRAP[$1]:-} "$BIN/holdfastd" run --config "$DIR/node$1/node.toml"; }
node_kill() { stop "node$1"; }
node_pause() { signal STOP "node$1"; }
node_resume() { signal CONT "node$1"; }
tenant() { hf tenant show acme | sed -n "s/^$1 *//p"; }
leader() { { hf tenant show acme || true; } | sed -n 's/.*(leader node\([0-9]*\)).*/\1/p'; }
has_leader() { local n; n=$(leader); [ -n "$n" ] && [ "${1:-0}" != "$n" ]; }
others() { local n; for n in 1 2 3; do [ "$n" = "$1" ] || echo "$n"; done; }
# shows PATTERN COMMAND...: what holdfast prints has such a line. (Its end is waited for: no broken pipe.)
shows() { local said pattern=$1; shift; said=$(hf "$@") || true; grep -Eq "$pattern" <<<"$said"; }
archived() { shows '^archived +everything' tenant show acme; }
three_replicas() { shows '^replicas +node.*node.*node' tenant show acme; }
breached() { shows '"state": "breached"' objectives --json; }
awaiting() { [ "$(hf node | grep -c 'awaiting restore')" = 3 ]; }
laid_out() {
  "$BIN/holdfast" init --region eu --dir "$DIR" --port 0 --bucket s3://holdfast/eu --cloud-region $CLOUD --endpoint "${BUCKET:-$S3}" >/dev/null
  "$BIN/holdfast" keyfile add "$DIR/keys.json" acme >/dev/null
}
# region_start [KEY]: three nodes in three zones, one tenant, a load on it.
region_start() {
  local n
  [ -e "$DIR/operator.toml" ] || laid_out
  for n in 1 2 3; do node_start $n; done
  within 60 "three nodes serve" hf node
  hf tenant create acme --tier enhanced --rpo 1s --rto 60s --key "${1:-local:acme}" --user app --password $PASSWORD >/dev/null
  ENDPOINTS=$(sed -n 's/^client_address = "\(.*\)"/\1/p' "$DIR"/node?/node.toml | paste -sd,)
  load_start
  steady
}
oracle() { "$BIN/holdfast-oracle" "$1" --endpoints "$ENDPOINTS" --user app@acme --password $PASSWORD --record "$DIR/record"; }
load_start() { touch "$DIR/record"; start load "$DIR/load.log" "$BIN/holdfast-oracle" write --endpoints "$ENDPOINTS" --user app@acme --password $PASSWORD --record "$DIR/record"; }
written() { grep -c '^a' "$DIR/record" || true; }
more_than() { [ "$(written)" -gt "$1" ]; }
# steady: a hundred more writes are acknowledged, soon.
steady() { local n; n=$(written); within 60 "writes are acknowledged" more_than $((n + 100)); }
# no_writes SECONDS: not one is acknowledged meanwhile.
no_writes() {
  local n; sleep 1; n=$(written); sleep "$1"
  [ "$(written)" -eq "$n" ] || fail "$(($(written) - n)) writes were acknowledged meanwhile"
  step "no write is acknowledged for $1 s"
}
# verify: the load ends, and everything that was acknowledged is read back.
verify() {
  [ -z "${PID[load]:-}" ] || stop load
  oracle verify > "$DIR/verified" 2>&1 || fail "$(tail -n 5 "$DIR/verified")"
  step "verified: $(tail -n 1 "$DIR/verified")"
}
# drilled: a restore from the bucket is tried and proven.
drilled() {
  caught_up
  expect "a drill restores it from the bucket and proves it" hf drill run acme
}
# caught_up: the load pauses until everything is in the bucket. (Beside it the archive is a moment behind.)
caught_up() {
  [ -z "${PID[load]:-}" ] || signal STOP load
  within 90 "the archive holds everything" archived
  [ -z "${PID[load]:-}" ] || signal CONT load
}

[ -z "${CHAOS_REGION:-}" ] || . "$CHAOS_REGION"
