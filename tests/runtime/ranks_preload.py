"""What the server of `ranks` imports before it forks."""

import torch
import torch._dynamo
import torch.distributed

import meshwright.model.zoo.gpt
import meshwright.model.zoo.llama
import meshwright.model.zoo.uneven
import meshwright.runtime.engine  # noqa: F401

torch.set_num_threads(1)
