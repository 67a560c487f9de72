"""Checkpoints on disk: safetensors files, the Hugging Face directory layout, and tables from keys to
parameters."""

from jaxmodels.checkpoints.huggingface import Checkpoint as Checkpoint
from jaxmodels.checkpoints.huggingface import read_json as read_json
from jaxmodels.checkpoints.huggingface import replaced_directory as replaced_directory
from jaxmodels.checkpoints.huggingface import resolve as resolve
from jaxmodels.checkpoints.huggingface import write_json as write_json
from jaxmodels.checkpoints.huggingface import write_weights as write_weights
from jaxmodels.checkpoints.mapping import Row as Row
from jaxmodels.checkpoints.safetensors import SafetensorsFile as SafetensorsFile
from jaxmodels.checkpoints.safetensors import write_safetensors as write_safetensors
