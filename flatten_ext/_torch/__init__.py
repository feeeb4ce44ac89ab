"""What torch asks of an operator beside its kernels: in Python, as the LibTorch stable ABI has none of it.

private    torch's private names, each with its reason and with what replaces it
arguments  the operators' arguments, split into tensors and options by the names of the schemas
families   what runs an operator forward, backward and by the reference
autograd   derivatives
hooks      autocast, vmap, fake tensors, the fallback, FLOPs
entry      what is refused or recorded before all that: nested tensors, torch.jit.trace
"""

from . import autograd as autograd
from . import entry as entry
from . import hooks as hooks
