"""The stages: pretrain, finetune, evaluate and predict, and what they share."""
