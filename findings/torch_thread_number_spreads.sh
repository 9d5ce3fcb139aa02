#!/bin/sh
# torch 2.15.0 on a CPU: torch.set_num_threads in one thread is also the number with which threads that
# are born later begin, while threads that run keep theirs; and a thread that has not asked for its
# number yet loses the one that it set as soon as another thread sets one. Nothing says so. Seen, with
# 4 in the main thread: a thread that sets 1 leaves the main thread at 4 and gives the next thread 1;
# a thread that sets 1 and waits while the main thread sets 4 has 4.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'END'
import sys
import threading

import torch


def within_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


torch.set_num_threads(4)
within_a_thread(lambda: torch.set_num_threads(1))
main, born_later = torch.get_num_threads(), within_a_thread(torch.get_num_threads)

has_set, go_on = threading.Event(), threading.Event()
kept = []


def waits():
    torch.set_num_threads(1)
    has_set.set()
    go_on.wait()
    kept.append(torch.get_num_threads())


thread = threading.Thread(target=waits)
thread.start()
has_set.wait()
torch.set_num_threads(4)
go_on.set()
thread.join()
print(f"main {main}, born later {born_later}, set to 1 before another set 4: {kept[0]}")
sys.exit(0 if (main, born_later, kept) == (4, 1, [4]) else 1)
END
