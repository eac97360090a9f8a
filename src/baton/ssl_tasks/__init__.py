"""Self-supervised pretext tasks: one method a file."""

from baton.ssl_tasks.autoresolution import Autoresolution as Autoresolution
from baton.ssl_tasks.color_quantizer import ColorQuantizer as ColorQuantizer
from baton.ssl_tasks.denoising import Denoising as Denoising
from baton.ssl_tasks.reconstruction import Reconstruction as Reconstruction
from baton.ssl_tasks.split_brain import SplitBrain as SplitBrain
