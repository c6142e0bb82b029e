"""Objectives that learn from preferences: train.objective dpo, ipo, hinge, orpo, simpo, cpo and kto."""
