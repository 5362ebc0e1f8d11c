#!/usr/bin/env bash
# Row 9: the network of one follower is slow; the majority serves on, and the follower converges.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/network.sh"
network_start
minio_start
region_start
slow=$(others "$(leader)")
slow=${slow%%$'\n'*}
slow_down "$slow" 64kbit
step "node $slow has 64 kbit/s"
for _ in 1 2 3 4 5; do steady; sleep 1; done
heal "$slow"
step "its network is as before"
within 60 "three nodes serve" hf node
steady
caught_up
verify
done_well
