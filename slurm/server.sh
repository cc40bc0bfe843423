
# The vLLM server has the last node of the job, the ranks have the others.
server=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
export ENTRL_VLLM_HOST="${ENTRL_VLLM_HOST:-$server}" # the name by which the ranks reach it; slurm.setup may export another
export no_proxy="${no_proxy:+$no_proxy,}$ENTRL_VLLM_HOST" NO_PROXY="${NO_PROXY:+$NO_PROXY,}$ENTRL_VLLM_HOST"
srun --nodes=1 --ntasks=1 --nodelist="$server" @{server_options} --output="$RUN/logs/server_$SLURM_JOB_ID.log" --open-mode=append \
    @{python} -m trl.cli.main @{serve} &
serving=$!
healthy='import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)'
until [ -n "$told" ] || @{python} -c "$healthy" "http://$ENTRL_VLLM_HOST:@{port}/health" 2>/dev/null; do
    kill -0 "$serving" 2>/dev/null || { echo "entrl: the vLLM server ended; see $RUN/logs/server_$SLURM_JOB_ID.log" >&2; exit 1; }
    sleep 2
done
