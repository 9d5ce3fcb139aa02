#!/bin/sh
# tbparse 0.0.9: of a run that was resumed from an older checkpoint SummaryReader gives the points that
# the second writer withdrew as well. SummaryWriter's purge_step says in the events file that what was
# logged from this step on is void; TensorBoard 2.21.0 then leaves it out, and so does its
# EventAccumulator by default. tbparse has one of these for each file, which does not see that another
# file voids it. A mean or a curve over the data frame mixes both. tensorboard-reducer 0.4.0 refuses
# such a run in one line and names an option. Seen: six steps, then five by a writer with purge_step=3;
# EventAccumulator has steps 0 to 7 once each, tbparse steps 3, 4 and 5 twice, with a value of each
# writer.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tbparse==0.0.9 tensorboard==2.21.0 tensorboardX==2.6.5
"$folder/venv/bin/python" - "$folder/log" <<'END'
import sys
import time

from tbparse import SummaryReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

folder = sys.argv[1]
for steps, purge_step in ((range(6), None), (range(3, 8), 3)):
    writer = SummaryWriter(folder, purge_step=purge_step)
    for step in steps:
        writer.add_scalar("accuracy", step + (100 if purge_step else 0), step)
    writer.close()
    time.sleep(1.1)  # a file's name has the second in which it was begun

events = EventAccumulator(folder)
events.Reload()
shown = [(e.step, int(e.value)) for e in events.Scalars("accuracy")]
frame = SummaryReader(folder).scalars
read = sorted((int(s), int(v)) for s, v in zip(frame["step"], frame["value"], strict=True))
print("TensorBoard", shown, "tbparse", read, sep="\n")
valid = [(s, s) for s in range(3)] + [(s, s + 100) for s in range(3, 8)]
sys.exit(0 if shown == valid and read == sorted(valid + [(s, s) for s in (3, 4, 5)]) else 1)
END
