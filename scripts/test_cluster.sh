#!/usr/bin/env bash
# A one-node SLURM with accounting, for tests: scripts/test_cluster.sh start|stop FOLDER
#
# Needs root and Debian's slurm-wlm, slurmdbd, munge and mariadb-server. What runs under FOLDER is told apart by the
# process ids written there, so that another cluster or database on this machine is left alone.
set -euo pipefail
action=$1
home=$(realpath -m "$2")
host=$(hostname)
conf=$home/slurm.conf

until_true() { # seconds, command: wait until the command succeeds
  for _ in $(seq $((2 * $1))); do "${@:2}" >/dev/null 2>&1 && return; sleep 0.5; done
  echo "error: gave up after $1 s waiting for: ${*:2}; see the logs in $home/log" >&2
  return 1
}

start() {
  for command in slurmctld slurmd slurmdbd munged mariadbd; do
    command -v "$command" >/dev/null || PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null || {
      echo "error: no $command here: apt-get install slurm-wlm slurmdbd munge mariadb-server" >&2
      exit 2
    }
  done
  mkdir -p "$home"/{state,spool,log,db}
  export PATH=$PATH:/usr/sbin:/sbin

  if ! pgrep -x munged >/dev/null; then
    mkdir -p /run/munge && chown munge: /run/munge
    su -s /bin/sh munge -c munged
    pgrep -x munged >"$home/munged.pid"
  fi

  # Accounts live in a database: sacct, which says how a job ended, asks it.
  chown mysql: "$home/db"
  [[ -d $home/db/mysql ]] ||
    mariadb-install-db --user=mysql --datadir="$home/db" --auth-root-authentication-method=normal >"$home/log/install" 2>&1
  mariadbd --no-defaults --user=mysql --datadir="$home/db" --socket="$home/db/socket" --pid-file="$home/db/pid" \
    --skip-networking --innodb-buffer-pool-size=128M >"$home/log/mariadbd" 2>&1 &
  echo $! >"$home/mariadbd.pid"
  until_true 60 mariadb-admin --no-defaults --socket="$home/db/socket" --user=root ping

  cat >"$home/slurmdbd.conf" <<END
DbdHost=$host
DbdAddr=127.0.0.1
AuthType=auth/munge
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounts
PidFile=$home/slurmdbd.pid
LogFile=$home/log/slurmdbd
END
  chmod 600 "$home/slurmdbd.conf"
  cat >"$conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/log/slurmctld
SlurmdLogFile=$home/log/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
MaxArraySize=4
ReturnToService=2
KillWait=3
OverTimeLimit=0
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(($(awk '/MemTotal/{print $2}' /proc/meminfo) / 1100)) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=3
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
  export SLURM_CONF=$conf
  MYSQL_UNIX_PORT=$home/db/socket slurmdbd
  until_true 60 sacctmgr --noheader show cluster
  sacctmgr --immediate --quiet add cluster test >/dev/null 2>&1 || true
  slurmctld
  until_true 30 scontrol ping
  slurmd
  until_true 60 bash -c 'sinfo --noheader --format=%T | grep -q idle'
}

stop() {
  for name in slurmd slurmctld slurmdbd mariadbd munged; do
    [[ -f $home/$name.pid ]] || continue
    id=$(<"$home/$name.pid")
    kill "$id" 2>/dev/null || continue
    for _ in $(seq 40); do kill -0 "$id" 2>/dev/null || break; sleep 0.25; done
  done
}

case $action in
  start | stop) "$action" ;;
  *) echo "usage: $0 start|stop FOLDER" >&2 && exit 2 ;;
esac
