"""A pass of inductor's that gives quack the products it makes faster: a model says nn.Linear and
nothing else."""

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from pretrain.ops import quack_products
from pretrain.ops.quack_products import QUACK_INSTALLED, quack_is_faster


class QuackProducts(CustomGraphPass):
    """Gives quack the products that `quack_is_faster` at, forward and backward."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            if quack_is_faster(*(x.meta["val"] for x in node.args)):
                node.target = torch.ops.longspan.product.default

    def uuid(self) -> Any:
        """What compiled code in a cache depends on."""
        return get_hash_for_files((__file__, quack_products.__file__)), QUACK_INSTALLED
