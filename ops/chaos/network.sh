# Shared by the scenarios with a network: a namespace and a link for each node, on one bridge.
TAG=hfc$((BASHPID % 10000))
SUBNET=10.214.$((BASHPID % 250))
network_start() {
  local n file
  ip link add "${TAG}br" type bridge
  ip addr add "$SUBNET.254/24" dev "${TAG}br"
  ip link set "${TAG}br" up
  for n in 1 2 3; do
    ip netns add "${TAG}n$n"
    ip link add "${TAG}v$n" type veth peer name eth0 netns "${TAG}n$n"
    ip link set "${TAG}v$n" master "${TAG}br" up
    ip -n "${TAG}n$n" addr add "$SUBNET.$n/24" dev eth0
    ip -n "${TAG}n$n" link set eth0 up
    ip -n "${TAG}n$n" link set lo up
    WRAP[$n]="ip netns exec ${TAG}n$n"
  done
  step "a network of three zones is up"
}
undo() {
  local n
  for n in 1 2 3; do ip netns del "${TAG}n$n"; ip link del "${TAG}v$n"; done 2>/dev/null
  ip link del "${TAG}br" 2>/dev/null
}
# MinIO on the bridge, and every node's addresses in its own namespace.
minio_start() {
  S3=http://$SUBNET.254:$(free_port)
  minio_run
  within 30 "MinIO listens" answers "$S3/minio/health/live"
  within 10 "there is a bucket" made_bucket
  laid_out
  local n port
  for n in 1 2 3; do
    for port in $(sed -n 's/^\(peer\|client\|admin\)_address = "127.0.0.1:\([0-9]*\)"/\2/p' "$DIR/node$n/node.toml"); do
      sed -i "s/127\.0\.0\.1:$port/$SUBNET.$n:$port/" "$DIR"/node?/node.toml "$DIR/operator.toml"
    done
  done
}
cut() { ip link set "${TAG}v$1" down; }
slow_down() { tc qdisc add dev "${TAG}v$1" root tbf rate "$2" burst 16kbit latency 400ms; }
heal() {
  ip link set "${TAG}v$1" up
  tc qdisc del dev "${TAG}v$1" root 2>/dev/null || true
}
