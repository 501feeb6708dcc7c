#!/bin/sh
# Give each process of the server its keys and no others: place-keys.sh DIR [ROOT]
# DIR is what `fedlr server certificate --out DIR` wrote; two secrets are added to it. Each file gets mode 0600 and the
# owner of the folder under ROOT/etc/fedlr that it goes to (systemd/tmpfiles.conf makes those). Again after a renewal.
set -eu
from=$1
root=${2:-}

secret() { # secret FILE: 256 random bits as text, unless it is there
    [ -f "$1" ] || (umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$1")
}

place() { # place FOLDER FILE...
    folder=$root/etc/fedlr/$1
    shift
    for file in "$@"; do
        install -m 0600 -o "$(stat -c %u "$folder")" -g "$(stat -c %g "$folder")" "$from/$file" "$folder/$file"
    done
}

secret "$from/superexec.secret"
secret "$from/view.token"
place superlink ca.crt superlink.crt superlink.key superexec.secret
place proxy ca.crt server.crt server.key
place server ca.crt superexec.secret
place view server.crt server.key view.token
echo "Devices need $from/ca.crt, operators also $from/view.token; now take $from/ca.key off this machine."
