#!/bin/bash
# The same command on several hosts by ssh; the first is the coordinator. All see the same folder under the same path.
#   HOSTS="a b" examples/several_hosts/ssh.sh jaxlab train configs/xmoe/fine_grained.yaml /shared/moe "mesh={node: 2, expert: 8}"
set -uo pipefail

read -ra hosts <<<"$HOSTS"
end_all() {
  trap - INT TERM
  kill $(jobs -p) 2>/dev/null
  wait
  exit "$1"
}
trap 'end_all 130' INT TERM
for index in "${!hosts[@]}"; do
  variables="JAX_COORDINATOR_ADDRESS=${hosts[0]}:${PORT:-8476} JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$index"
  ${SSH:-ssh -tt} "${hosts[$index]}" "cd ${PWD@Q} && exec env $variables ${*@Q}" &
done
for _ in "${hosts[@]}"; do
  wait -n || end_all $? # one that fails ends all
done
