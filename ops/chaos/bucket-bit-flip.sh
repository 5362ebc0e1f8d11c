#!/usr/bin/env bash
# Row 21: a bit flips in an object of the archive; a drill names it, and a new checkpoint makes the
# archive whole again.
. "$(dirname "$0")/lib.sh"
minio_start
region_start
drilled
id=$(tenant id | cut -d, -f1)
chain=eu/tenants/$id/0000000001/chain
within 30 "the archive has ten links" s3 GET "holdfast/$chain/$(printf %020d 10)" -o /dev/null
link=$chain/$(printf %020d 5)
s3 GET "holdfast/$link" -o "$DIR/link"
flip "$DIR/link" 40
s3 PUT "holdfast/$link" --data-binary "@$DIR/link"
step "a bit of link 5 is flipped"
names_it() { hf drill run acme >"$DIR/drill" 2>&1; grep -q "chain/$(printf %020d 5)" "$DIR/drill"; }
expect "a drill fails and names the object" names_it
expect "a checkpoint is made from the live replicas" hf archive checkpoint acme
drilled
verify
done_well
