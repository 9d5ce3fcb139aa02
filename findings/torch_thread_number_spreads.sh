#!/bin/sh
# torch 2.15.0 on a CPU: torch.set_num_threads in one thread is also the number with which threads that
# are born later begin, and a thread that has not yet asked for its number, or run a kernel, loses the
# one that it set as soon as another thread sets one. Nothing says so. Seen: the main thread sets 4,
# another sets 1, and the main thread has 1; now that it has asked, it sets 4 again, another sets 1, and
# it has 4, while a thread that is born later has 1.
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
not_asked = torch.get_num_threads()
torch.set_num_threads(4)
within_a_thread(lambda: torch.set_num_threads(1))
asked, born_later = torch.get_num_threads(), within_a_thread(torch.get_num_threads)
print(f"main set 4, had not asked: {not_asked}; had asked: {asked}; born later: {born_later}")
sys.exit(0 if (not_asked, asked, born_later) == (1, 4, 1) else 1)
END
