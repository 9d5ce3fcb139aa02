#!/bin/sh
# tensorboardX 2.6.5: SummaryWriter.flush() returns before the events that were added just before it
# are in the file. Its docstring says that all pending events have been written then. add_scalar puts
# an event into a queue that a thread empties; flush() flushes the file and does not wait for the
# queue. A program that is killed after flush() loses them. Seen: of 200 scalars, each followed by
# flush(), fewer than 200 stand in the file when the last flush() returns, and all a while later.
# torch.utils.tensorboard waits for its queue, and has all of them (torch is not needed here).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorboardX==2.6.5 numpy==2.4.6 protobuf==7.35.1 2> /dev/null ||
    "$folder/venv/bin/pip" install --quiet tensorboardX==2.6.5 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/log" <<'END'
import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter

TAG = b"a_scalar"
folder = Path(sys.argv[1])
writer = SummaryWriter(str(folder))
for step in range(200):
    writer.add_scalar(TAG.decode(), 0.5, step)
    writer.flush()


def written():
    return b"".join(path.read_bytes() for path in folder.iterdir()).count(TAG)


at_once = written()
time.sleep(1)
writer.flush()
later = written()
print(f"after the last flush() {at_once} of 200 scalars are in the file, a second later {later}")
sys.exit(0 if at_once < 200 == later else 1)
END
