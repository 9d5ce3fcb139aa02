"""Accuracies that others published, to be drawn beside ours and marked as such."""

PAPER = {  # Wu et al. 2018: model -> (label, blocks, FLOPs or None, accuracy)
    "R32_C10": [("stage 1", 9.4, None, 0.886), ("stage 2", 6.9, None, 0.913)],
    "R110_C10": [("stage 1", 20.1, None, 0.754), ("stage 2", 16.93, 1.81e8, 0.936)],
    "R101_ImgNet": [("stage 1", 29.79, None, 0.746), ("stage 2", 24.77, 1.25e10, 0.764)],
}

# One network for the whole curve on CIFAR-10: (FLOPs, accuracy), read off the figures of RANet's
# repository to 0.2 points; 2 FLOPs a multiply-add.
ANYTIME = {
    "published: MSDNet": [(0.30e8, 0.895), (0.76e8, 0.915), (1.24e8, 0.930)],
    "published: ResNet with early exits": [(0.56e8, 0.852), (1.12e8, 0.894)],
}
