#!/usr/bin/env bash
# Row 13: a bit flips in the files of a leader's replica while it is down; its peers fill a new one, and the
# tenant is served throughout.
. "$(dirname "$0")/lib.sh"
minio_start
region_start
old=$(leader)
# A checkpoint flushes, so that there are files.
expect "a checkpoint is made" hf archive checkpoint acme
id=$(tenant id | cut -d, -f1)
node_kill "$old"
within 30 "another node leads" has_leader "$old"
steady
manifest=$(ls "$DIR/node$old/data/tenants/$id-1"/engine-*/MANIFEST-* | head -1)
flip "$manifest" $(($(stat -c %s "$manifest") - 20))
step "a bit in the replica of node $old is flipped"
node_start "$old"
rebuilt() { shows 'replica-rebuilt' events --tenant acme; }
within 60 "its peers have filled a new replica" rebuilt
within 30 "the tenant has three replicas" three_replicas
steady
drilled
verify
done_well
