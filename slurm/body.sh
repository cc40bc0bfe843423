# USR1 comes before the time limit and before preemption. srun hands it on to every rank; TERM would make it end the step.
told=''
ranks=''
stop() {
    told=$1
    echo "entrl: got $told; the ranks stop after their step, with a checkpoint"
    [ -n "$ranks" ] && kill -USR1 "$ranks" 2>/dev/null
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

cd @{folder} || { echo "entrl: $HOSTNAME does not see this folder; the nodes need the file system it is on." >&2; exit 2; }
@{setup}
# Where the ranks meet; slurm.setup may export others.
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
if [ -z "$MASTER_PORT" ]; then
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # below the ports that systems hand out
    while (: >"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done # somebody has it
fi
export MASTER_PORT
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
echo "entrl: $RUN on ${SLURM_JOB_NODELIST}, start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID, $(date)"

errors() { find "$RUN/logs" -name 'rank_*.error' -printf '%T@ %p\n' 2>/dev/null | sort -n | cut -d' ' -f2-; } # oldest first
earlier=$(errors)
@{server}
# A rank that fails ends the others at once (--kill-on-bad-exit). One that stopped with a checkpoint, 85, must not: another may
# still be writing. So its task ends with 0, and RUN/STOPPED tells that from a run that is done.
# Slurm signals every process of a task: this shell, and ranks that are still importing, must not die of it.
code=85
if [ -z "$told" ]; then
    srun --nodes=@{nodes} --ntasks=@{tasks} --ntasks-per-node=@{processes} @{step_options} --kill-on-bad-exit=1 --wait=0 \
        bash -c 'trap "" USR1 TERM; "$@"; code=$?; [ "$code" = 85 ] && exit 0; exit "$code"' rank \
        @{python} -m rl.rank "$RUN" &
    ranks=$!
    wait "$ranks"
    while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done # a signal ends a wait early
    wait "$ranks"
    code=$?
fi
[ "$code" = 0 ] && [ -e "$RUN/STOPPED" ] && code=85

if [ "$code" = 85 ]; then
    # the id of a task of an array: the array's own would requeue all of it
    job=$SLURM_JOB_ID
    [ -n "$SLURM_ARRAY_JOB_ID" ] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    state=$(squeue --noheader --job="$job" --format=%T)
    if [ "$state" != RUNNING ]; then
        echo "entrl: stopped with a checkpoint; the job is $state, so Slurm decides whether it comes back"
    elif scontrol requeue "$job"; then
        echo "entrl: stopped with a checkpoint; job $job is in the queue again"
    else
        echo "entrl: stopped with a checkpoint, but Slurm does not take job $job back. Submit its script again to go on."
    fi
elif [ "$code" != 0 ]; then
    first=$(errors | grep -vxF "$earlier" | head -n 1)
    if [ -n "$first" ]; then
        [ "$code" = 2 ] || code=1 # srun gives 137 for the ranks that it ended because of this one
        echo "entrl: exit code $code; the first rank that failed was $(basename "$first" .error):"
        cat "$first"
    else
        echo "entrl: exit code $code, and no rank could say why. Killed from outside (137), it is often for want of memory: slurm.mem."
    fi
    [ -e "$RUN/FAILED" ] || tail -n 1 "${first:-/dev/null}" | grep . >"$RUN/FAILED" || echo "exit code $code" >"$RUN/FAILED"
fi
exit "$code"
