"""Pre-LIFT fine-tuning: a model that is used to being LIFTed (LIFT, section 3.3), and a meta-learned start of the adapter."""
