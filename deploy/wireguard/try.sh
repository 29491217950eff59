#!/usr/bin/env bash
# Two sites on one machine: network namespaces with a wire between them, WireGuard over the wire,
# a Ray node and an actor at each, and a look at what passes over the wire. Needs the commands
# ip, unshare, nsenter, tcpdump, wg, wg-quick and wireguard-go (or a kernel with WireGuard), and
# hdnn-dist. Run it as root; all that it makes is gone when it ends.
#
#   deploy/wireguard/try.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ "${1:-}" != inside ]; then
    exec unshare --net --mount --pid --fork --kill-child --mount-proc "$0" inside
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HOME=$work/home RAY_USAGE_STATS_ENABLED=0
mkdir -p "$HOME/.ray" "$work/a" "$work/b"
(umask 077 && head -c 32 /dev/urandom | base64 > "$HOME/.ray/auth_token")

site() { nsenter --target "${pid[$1]}" --net --mount "${@:2}"; } # run a command at a site
declare -A pid wire=([a]=192.168.77.1 [b]=192.168.77.2) tunnel=([a]=10.99.0.1 [b]=10.99.0.2)
for s in a b; do
    unshare --net --mount sleep infinity &
    pid[$s]=$!
done
sleep 1
ip link add wire-a type veth peer name wire-b
for s in a b; do
    ip link set wire-$s netns "${pid[$s]}"
    site $s mount -t tmpfs none /var/run # where wireguard-go has its socket
    site $s ip link set lo up
    site $s ip address add "${wire[$s]}/24" dev wire-$s
    site $s ip link set wire-$s up
    wg genkey > "$work/$s/key"
    wg pubkey < "$work/$s/key" > "$work/$s/pub"
done
for s in a b; do
    [ $s = a ] && o=b || o=a
    O=${o^^}
    sed -e "s|PRIVATE_KEY_OF_${s^^}|$(cat "$work/$s/key")|" \
        -e "s|PUBLIC_KEY_OF_$O|$(cat "$work/$o/pub")|; s|ADDRESS_OF_$O|${wire[$o]}|" \
        -e '/^# Site c/,/^PersistentKeepalive/d' "$here/site-$s.conf" > "$work/$s/wg0.conf"
    chmod 600 "$work/$s/wg0.conf"
    site $s wg-quick up "$work/$s/wg0.conf"
done
site a tcpdump -Z root --immediate-mode -i wire-a -n -U -w "$work/wire.pcap" 2> "$work/tcpdump.log" &
dump=$!

node=(ray start --block --num-cpus=1 --disable-usage-stats)
site a "${node[@]}" --head --node-ip-address="${tunnel[a]}" --port=6379 --include-dashboard=false \
    --temp-dir="$work/ray" > "$work/a/log" 2>&1 &
sleep 15
RAY_AUTH_MODE=token site b "${node[@]}" --address="${tunnel[a]}:6379" \
    --node-ip-address="${tunnel[b]}" > "$work/b/log" 2>&1 &
sleep 15
site a hdnn-dist train --address "${tunnel[a]}:6379" --run "$work/run" \
    --set topology.agents=2 --set 'topology.edges=[[a1, a2]]' --set training.epochs=1 \
    --set cluster.placement=spread
kill $dump
wait $dump || true
site a wg show wg0
passed() { tcpdump -Z root -n -r "$work/wire.pcap" "$@" 2> /dev/null; }
others='not udp port 51820 and not arp and not ip6 multicast' # the last two: neighbours finding each other
echo "on the wire: $(passed udp port 51820 | wc -l) packets of WireGuard, $(passed "$others" | wc -l) others"
passed "$others"
