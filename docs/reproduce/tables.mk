# The paper's tables, ours beside the paper's: `make table2`, `table3`, `table-tau`, `table5`,
# `table6`, or `make tables`; beyond the paper `table-dropped` and `table-rounds`. Each trains what
# its rows ask for, once a seed, and ends in TABLES/TABLE.md: means over the seeds with intervals, and
# which of the paper's orderings hold.
# Tables share models and labels; what is there is not made again. One process uses one core:
#
#   OMP_NUM_THREADS=1 make -j2 table3 SEEDS="0 1 2"   # on drawn data: half an hour a seed and core
#   make tables DATA=real DEVICE=cuda STEPS=20000 VIDEO_STEPS=6000 PAIRS=8      # on $(REAL)
#   make tables TRAIN_JSON=maps/train_image.json FRAMES=train/JPEGImages VALID=valid.json \
#     VALID_FRAMES=valid/JPEGImages PRESET=resnet50-ytvis2019 INIT=cocopretrain_R50.pth DEVICE=cuda
#
# The paper starts from a model that was trained on COCO. INIT is such a model; without it the masked
# images alone take its place (`pretrain`). Other settings want another TABLES: runs are never mixed.
SEEDS ?= 0 1 2
# synth: drawn for each seed; real: $(REAL); own: TRAIN_JSON, FRAMES and VALID.
DATA ?= $(if $(TRAIN_JSON),own,synth)
TABLES ?= build/tables/$(DATA)

# $(call given,NAME,DEFAULT): a variable as the user gave it, for `make real` has other defaults.
given = $(if $(filter command environment override,$(origin $1)),$($1),$2)
# $(call by_data,SYNTH,REAL,OWN)
by_data = $(if $(filter synth,$(DATA)),$1,$(if $(filter real,$(DATA)),$2,$3))

T_PRESET := $(call given,PRESET,$(call by_data,tiny,mobilenet_v2,resnet50-ytvis2019))
T_PRE_STEPS := $(call given,PRE_STEPS,$(call by_data,1000,$(STEPS),))
T_STEPS := $(call given,STEPS,$(call by_data,1500,$(STEPS),))
# A quarter of the image steps; where only the preset knows these, of YouTube-VIS's 12000.
T_EARLY_STEPS := $(call given,EARLY_STEPS,$(if $(T_STEPS),$(shell expr \( $(T_STEPS) + 3 \) / 4),3000))
T_VIDEO_STEPS := $(call given,VIDEO_STEPS,$(call by_data,450,$(VIDEO_STEPS),))
# Scores of the tiny model are other than the paper's model's: the same rule, another threshold.
T_TAU := $(call given,TAU,$(call by_data,0.35,$(TAU),0.2))
TAU_LOW ?= $(call by_data,0.2,0.1,0.1)
TAU_HIGH ?= $(call by_data,0.5,0.3,0.3)
# The labels of the authors' code do not overlap (they say NoOverlap1); the paper does not tell.
OVERLAP ?= 0.5
# Of the drawn videos: things of no category, so that labels go wrong as they do in real videos.
CLUTTER ?= 0.3
# Further options of `pmvis synth`, such as --train-videos 20.
SYNTH ?=
# Further settings of all training runs, such as train.pairs_per_batch=8.
SET ?= $(call by_data,,train.pairs_per_batch=$(PAIRS) train.box_only_share=$(BOX_ONLY) $(SCHEDULE),)
# Further settings of the video stages: as in the paper they see pseudo labels alone. The demo's mix
# of half stills (0.5) steadies a small model, and hides what bad labels do.
VIDEO_SET ?= $(call by_data,train.image_share=0,train.image_share=0,)
# Settings of inference: of all of it, and on top of them of that which makes labels.
INFER_SET ?= $(call by_data,,$(SCORES),)
LABEL_SET ?= $(call by_data,,select_score=0.1 init_score=0.2 row_score=0.05,)
# What the control shares with the video stage: its learning rate and warm-up.
CONTROL_SET ?= $(call by_data,train.learning_rate=7e-4 train.warmup_steps=50,\
  train.learning_rate=3e-4 train.warmup_steps=50,)
# Most rounds of self-training, and the least score that it refines: far below tau, to save time.
ROUNDS := 1 2 3
# Steps of all rounds, where those of one are known.
ALL_STEPS = $(and $(T_VIDEO_STEPS),$(shell expr $(T_VIDEO_STEPS) \* $(words $(ROUNDS))))
ROUNDS_FROM ?= $(TAU_LOW)
INIT ?=
T_BACKBONE := $(call given,BACKBONE,$(call by_data,,$(BACKBONE),))

IMAGES := masks masks-boxinst-all masks-boxinst-box frozen boxinst early
FLAGS_masks-boxinst-all := --box-loss-all
FLAGS_masks-boxinst-box := --box-loss
FLAGS_frozen := --freeze-mask-head
FLAGS_boxinst := --no-mask-loss --box-loss-all

steps = $(if $1,--steps $1)
SETTINGS = $(addprefix --set ,$(SET))
T_TRAIN = --preset $(T_PRESET) --device $(DEVICE)
T_INFER = $(PMVIS) infer --device $(DEVICE) --resume $(addprefix --set ,$(INFER_SET))
LABELS := k4-t$(T_TAU)

# Where things lie, by the folder of a seed.
train_json = $(call by_data,$1/maps/train_image.json,$R/maps/train_image.json,$(TRAIN_JSON))
frames_of = $(if $(filter own,$(DATA)),$(T_FRAMES),$(call \
  by_data,$1/data/videos/train.json,$(UNLABELLED)))
valid_of = $(if $(filter synth,$(DATA)),$1/data/videos/valid.json,$(T_VALID))
# One's own data have no defaults; `make real` has a VALID for its.
T_FRAMES = $(or $(FRAMES),$(error \
  give FRAMES=train/JPEGImages, the unlabelled videos, with TRAIN_JSON))
T_VALID = $(if $(filter own,$(DATA)),$(or $(call given,VALID,),$(error \
  give VALID=valid.json, annotated videos to measure on, with TRAIN_JSON)),$(VALID))
first_model = $(or $(INIT),$1/pretrain/model.safetensors)

# A filter may leave nothing of what a poor model found (exit code 1). That ends no table: the labels
# become an empty file, so does the model that would learn from them, and the metrics file of the
# row says why it has none, which `pmvis table` repeats.
OR_NONE = || { [ $$$$? = 1 ] && : > $$@; }
UNLESS_NONE = [ ! -s $$< ] ||
NO_LABELS = filter kept no track of the image model; give a lower TAU, or train it for longer

# $(call SEED_RULES,folder,seed): data, image models, their labels, and the figures of every model
define SEED_RULES
.PRECIOUS: $1/%.raw.tracks.jsonl $1/%.refined.tracks.jsonl $1/%.metrics.json

$1/data/synth.json: | $(VENV)/ready
	$(PMVIS) synth -o $$(@D) --seed $2 --clutter $(CLUTTER) $(SYNTH) --overwrite

$1/maps/train_image.json: $1/data/synth.json
	$(PMVIS) map-categories --target $1/data/target.json --coco $1/data/coco/instances_train.json \
	  --imagenet-bbox $1/data/imagenet/Annotations --overwrite -o $$(@D)

$1/pretrain/model.safetensors: $(call train_json,$1)
	$(PMVIS) train-image --data $$< $(T_TRAIN) $(call steps,$(T_PRE_STEPS)) --seed $2 \
	  $(if $(T_BACKBONE),--init-backbone $(T_BACKBONE)) $(SETTINGS) --set train.box_only_share=0 \
	  -o $$(@D)

$(IMAGES:%=$1/%/model.safetensors): $1/%/model.safetensors: $(call first_model,$1) \
    $(call train_json,$1)
	$(PMVIS) train-image --data $(call train_json,$1) $(T_TRAIN) $$(FLAGS_$$*) \
	  $$(call steps,$$(if $$(filter early,$$*),$(T_EARLY_STEPS),$(T_STEPS))) $(SETTINGS) \
	  --init $$< --seed $2 -o $$(@D)

$(IMAGES:%=$1/%.control/model.safetensors): $1/%.control/model.safetensors: $1/%/model.safetensors
	$(PMVIS) train-image --data $(call train_json,$1) $(T_TRAIN) $(call steps,$(T_VIDEO_STEPS)) \
	  $(SETTINGS) $(addprefix --set ,$(CONTROL_SET)) --init $$< --seed $2 -o $$(@D)

$1/%.raw.tracks.jsonl: $1/%/model.safetensors
	$(T_INFER) $(addprefix --set ,$(LABEL_SET)) --weights $$< --frames $(call frames_of,$1) -o $$@

$1/%.refined.tracks.jsonl: $1/%.raw.tracks.jsonl
	$(PMVIS) refine $$< --frames $(call frames_of,$1) -o $$@

$1/%.metrics.json: $1/%/model.safetensors
	$(UNLESS_NONE) $(T_INFER) --weights $$< --frames $(call valid_of,$1) \
	  $(if $(VALID_FRAMES),--root $(VALID_FRAMES)) -o $1/$$*.out.tracks.jsonl
	$(UNLESS_NONE) $(PMVIS) eval $1/$$*.out.tracks.jsonl --gt $(call valid_of,$1) -o $$@
	@[ -s $$< ] || echo '{"none": "$(NO_LABELS)"}' > $$@
endef

# $(call KEPT_RULES,folder,seed,image model,K,tau): filtered labels, and a video model of them.
# K = 0 is no filter at all: the overlap removal goes as well.
define KEPT_RULES
$1/$3.k$4-t$5.kept.tracks.jsonl: $1/$3.refined.tracks.jsonl
	$(PMVIS) filter $$< --topk $4 --pscore $5 $(if $(filter-out 0,$4),--overlap $(OVERLAP)) \
	  --fail-empty -o $$@ $(OR_NONE)
$(call VIDEO_RULE,$1,$2,$3,k$4-t$5,,)
endef

# $(call IGNORE_RULES,folder,seed,labels): of the same labels, what `filter` dropped set aside
define IGNORE_RULES
$1/masks.$3.aside.tracks.jsonl: $1/masks.refined.tracks.jsonl
	$(PMVIS) filter $$< --topk 4 --pscore $(T_TAU) --overlap $(OVERLAP) --keep-ignored \
	  --fail-empty -o $$@ $(OR_NONE)

$(call VIDEO_RULE,$1,$2,masks,$3,.ignore,--dropped ignore,aside)
endef

# $(call ROUNDS_RULES,folder,seed): rounds of self-training to the last, whatever it would stop at,
# and the control of as many steps on images as all of them
define ROUNDS_RULES
$1/masks.rounds/result.json: $1/masks/model.safetensors $(call train_json,$1)
	$(PMVIS) self-train --init $1/masks --frames $(call frames_of,$1) \
	  --gt $(call valid_of,$1) $(if $(VALID_FRAMES),--gt-frames $(VALID_FRAMES)) \
	  --rounds $(words $(ROUNDS)) --patience $(words $(ROUNDS)) --topk 4 --pscore $(T_TAU) \
	  --overlap $(OVERLAP) --refine-pscore $(ROUNDS_FROM) --data $(call train_json,$1) \
	  $(T_TRAIN) $(call steps,$(T_VIDEO_STEPS)) $(SETTINGS) $(addprefix --set ,$(VIDEO_SET)) \
	  $(addprefix --infer-set ,$(INFER_SET)) --seed $2 -o $$(@D) $(OR_NONE)

# there already, but for rounds that found no labels to learn from
$(ROUNDS:%=$1/masks.rounds/round-%/valid.metrics.json): | $1/masks.rounds/result.json
	@[ -s $$@ ] || { mkdir -p $$(@D) && echo '{"none": "$(NO_LABELS)"}' > $$@; }

$1/masks.control$(words $(ROUNDS))/model.safetensors: $1/masks/model.safetensors
	$(PMVIS) train-image --data $(call train_json,$1) $(T_TRAIN) \
	  $(call steps,$(ALL_STEPS)) $(SETTINGS) $(addprefix --set ,$(CONTROL_SET)) --init $$< \
	  --seed $2 -o $$(@D)
endef

# $(call VIDEO_RULE,folder,seed,image model,labels,end of the name,flags,kind of labels: kept)
define VIDEO_RULE
$1/$3.$4$5/model.safetensors: $1/$3.$4.$(or $7,kept).tracks.jsonl $1/$3/model.safetensors
	$(UNLESS_NONE) $(PMVIS) train-video --pseudo $$< --frames $(call frames_of,$1) \
	  --data $(call train_json,$1) $(T_TRAIN) $(call steps,$(T_VIDEO_STEPS)) $(SETTINGS) \
	  $(addprefix --set ,$(VIDEO_SET)) --init $1/$3 $6 --seed $2 -o $$(@D)
	@[ -s $$< ] || { mkdir -p $$(@D) && : > $$@; }

endef

define EACH_SEED
$(call SEED_RULES,$1,$2)
$(call KEPT_RULES,$1,$2,masks,0,0)
$(foreach k,1 2 3 4 5,$(call KEPT_RULES,$1,$2,masks,$k,$(T_TAU))
)
$(foreach tau,$(filter-out $(T_TAU),$(sort 0 $(TAU_LOW) $(TAU_HIGH))),$(call KEPT_RULES,$1,$2,masks,4,$(tau))
)
$(foreach image,early boxinst,$(call KEPT_RULES,$1,$2,$(image),4,$(T_TAU))
)
$(call VIDEO_RULE,$1,$2,masks,$(LABELS),.mask,--no-box-loss)
$(call VIDEO_RULE,$1,$2,masks,$(LABELS),.boxinst,--no-mask-loss)
$(call VIDEO_RULE,$1,$2,masks,$(LABELS),.neither,--no-mask-loss --no-box-loss)
$(call IGNORE_RULES,$1,$2,$(LABELS))
$(call ROUNDS_RULES,$1,$2)
endef
$(foreach s,$(SEEDS),$(eval $(call EACH_SEED,$(TABLES)/seed$s,$s)))

# The rows of each table: ROW=NAME, or NAME alone where the row is called so.
ROWS_table2 := masks masks-boxinst-all masks-boxinst-box frozen boxinst
ROWS_table3 := image=masks control=masks.control 0=masks.k0-t0 \
  $(foreach k,1 2 3 4 5,$k=masks.k$k-t$(T_TAU))
ROWS_table-tau := image=masks control=masks.control none=masks.k4-t0 low=masks.k4-t$(TAU_LOW) \
  chosen=masks.$(LABELS) high=masks.k4-t$(TAU_HIGH)
ROWS_table5 := image=masks control=masks.control both=masks.$(LABELS) mask=masks.$(LABELS).mask \
  boxinst=masks.$(LABELS).boxinst neither=masks.$(LABELS).neither
ROWS_table6 := $(foreach i,early boxinst masks,$i $i-video=$i.$(LABELS) $i-control=$i.control)
ROWS_table-dropped := image=masks control=masks.control ignore=masks.$(LABELS).ignore \
  background=masks.$(LABELS)
ROWS_table-rounds := image=masks control=masks.control \
  $(if $(T_VIDEO_STEPS),control-all=masks.control$(words $(ROUNDS))) \
  $(foreach i,$(ROUNDS),$i=masks.rounds/round-$i/valid)

SEED_FOLDERS := $(SEEDS:%=$(TABLES)/seed%)
row_names = $(foreach row,$(ROWS_$1),$(lastword $(subst =, ,$(row))))

.PHONY: tables table2 table3 table-tau table5 table6 table-dropped table-rounds
table2: $(TABLES)/table2.md  ## Table II: what supervises the image stage
table3: $(TABLES)/table3.md  ## Table III: K of TopK
table-tau: $(TABLES)/table-tau.md  ## The table that the paper lacks: tau of PScore
table5: $(TABLES)/table5.md  ## Table V: losses of the video stage
table6: $(TABLES)/table6.md  ## Table VI: a better image model, a better video model
table-dropped: $(TABLES)/table-dropped.md  ## Beyond the paper: what a filter dropped, ignored or background
table-rounds: $(TABLES)/table-rounds.md  ## Beyond the paper: rounds of self-training
tables: table2 table3 table-tau table5 table6  ## All of these; SEEDS="0 1 2"; see docs/reproduce

define TABLE_RULE
$(TABLES)/$1.md: $(foreach seed,$(SEED_FOLDERS),$(foreach name,$(call row_names,$1),\
    $(seed)/$(name).metrics.json))
	$(PMVIS) table $(SEED_FOLDERS) --paper $(patsubst -%,%,$(1:table%=%)) \
	  $(addprefix --row ,$(foreach row,$(ROWS_$1),$(if $(findstring =,$(row)),$(row)))) -o $$@
endef
$(foreach table,table2 table3 table-tau table5 table6 table-dropped table-rounds,$(eval $(call TABLE_RULE,$(table))))
