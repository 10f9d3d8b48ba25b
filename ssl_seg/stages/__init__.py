"""The stages: pretrain, finetune, evaluate, predict and select, and what they share."""
