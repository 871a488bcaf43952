"""Imported once by the fork server, so that a rank starts with everything in memory."""

import os

import torch
import torch.distributed

import megatree.recipes.job  # noqa: F401 (all of the runtime, which every rank uses)

torch.set_num_threads(1)
torch.testing.assert_close(torch.ones(1), torch.ones(1))  # imports what torch imports lazily

SERVER = os.getpid()
