"""All that is hard for a tracer: timers, forks, spawns, exec from a thread, a stopped child, threads; exits with 3.

Usage: torture.py FILE.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time


def read(times=20):
    descriptor = os.open(sys.argv[1], os.O_RDONLY)
    for at in range(times):
        os.pread(descriptor, 100, at)
    os.close(descriptor)


def child(queue):
    read(30)
    queue.put(os.getpid())


if __name__ == "__main__":
    alarms = []
    signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    for _ in range(20):
        read(5)
        time.sleep(0.003)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        processes = [context.Process(target=child, args=(queue,)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            queue.get()
            process.join()
        assert all(process.exitcode == 0 for process in processes), method
    assert subprocess.run(["sh", "-c", "cat /etc/hostname > /dev/null; exit 7"], check=False).returncode == 7
    sleeper = subprocess.Popen(["sleep", "60"])
    os.kill(sleeper.pid, signal.SIGSTOP)
    stopped = os.waitpid(sleeper.pid, os.WUNTRACED)[1]
    assert os.WIFSTOPPED(stopped), stopped
    os.kill(sleeper.pid, signal.SIGCONT)
    sleeper.kill()
    assert sleeper.wait() == -9
    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pid = os.fork()
    if pid == 0:
        threading.Thread(target=lambda: os.execvp("true", ["true"])).start()
        time.sleep(60)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    print("alarms", bool(alarms))
    sys.exit(3)
