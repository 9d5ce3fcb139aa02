# One chain for every CIFAR model: a ResNet for every route, one policy network for every
# penalty on it, and the paper's two stages for --penalty -5. A recipe sets the lengths, in epochs
# (PLAIN, ROUTES, WARM, GRADIENT, TUNE), FREED, by how many blocks the curriculum grows an epoch,
# and the base's BATCH and RATE. FROM is a ResNet to begin as, of as many blocks or fewer; where it
# is empty, a plain one is trained first. PENALTIES are those that the one network is profiled at.
. recipes/common.sh

# Stage 0: a plain ResNet, then one that serves every route.
if [ -n "${FROM:-}" ]; then
    RATE=${RATE:-0.05}
else
    stage plain pretrain --max_epochs "$PLAIN" --batch_size 256 --lr 0.4
    FROM=$OUT/plain RATE=${RATE:-0.1}
fi
BASE=$OUT/base BATCH=${BATCH:-128}
stage base pretrain --routes --pretrained "$FROM" --max_epochs "$ROUTES" --batch_size $BATCH --lr $RATE

# The policy network starts from a classifier of its own size.
stage classifier pretrain --model "R8_${MODEL#*_}" --max_epochs 25 --batch_size 256 --lr 0.4

# Stage 1: one policy network for every penalty, then the curriculum and the policy gradient for one.
START="--base $BASE --batch_size 128 --policy_size 16 --warm_start $WARM
    --policy_init $OUT/classifier"
stage curve cl_training $START --max_epochs "$WARM" --schedule cosine --lr 3e-3 --penalty -5
stage stage1 cl_training $START --load "$OUT/curve" --max_epochs $((WARM + GRADIENT)) --penalty -5 \
    --lr 2e-4 --cl_step "$FREED" --cl_blocks "$FREED" --samples 2 --alpha 0.95 --beta 0.01

# Stage 2: the ResNet for every penalty, and the paper's form, both networks for one penalty.
FINETUNE="--base $BASE --batch_size 128 --schedule cosine --resnet_lr 0.02 --distill 0.5
    --max_epochs $TUNE"
stage penalties finetune $FINETUNE --pretrained "$OUT/curve/last.t7" --penalty -5 --penalties -0.5 -50
stage stage2 finetune $FINETUNE --pretrained "$OUT/stage1/last.t7" --penalty -5 --alpha 0.95

for penalty in ${PENALTIES:--0.5 -2 -5 -15 -50}; do
    profile "curve$penalty" --base "$BASE" --load "$OUT/curve" --penalty $penalty --dependence
    profile "penalties$penalty" --load "$OUT/penalties" --penalty $penalty --dependence
done
profile full --base "$BASE"
profile stage1 --base "$BASE" --load "$OUT/stage1" --dependence
profile stage2 --load "$OUT/stage2" --dependence
