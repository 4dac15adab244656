"""A pass of inductor's over the products of a compiled block: a model says nn.Linear and nothing
else.

- quack gets those that it makes faster.
- What autocast makes narrow and at once wide again, the gradient of a weight, stays as it was
  summed: it is neither rounded nor read and written once more.
"""

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from pretrain.ops import quack_products
from pretrain.ops.quack_products import QUACK_INSTALLED, quack_is_faster


class FasterProducts(CustomGraphPass):
    """See above; forward and backward."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            operands = tuple(x.meta["val"] for x in node.args)
            if quack_is_faster(*operands):
                node.target = torch.ops.longspan.product.default
                node.meta["eager_input_vals"] = operands, {}  # or they may come with other strides
            elif widened := _widened(node):
                node.target, node.args = torch.ops.aten.mm.dtype, (*node.args, torch.float32)
                node.meta["val"] = widened.meta["val"]
                widened.replace_all_uses_with(node)
                graph.erase_node(widened)

    def uuid(self) -> Any:
        """What compiled code in a cache depends on."""
        return get_hash_for_files((__file__, quack_products.__file__)), QUACK_INSTALLED


def _widened(product: fx.Node) -> fx.Node | None:
    """The conversion to fp32 that is all that is made of a narrow product on a GPU."""
    value, users = product.meta["val"], list(product.users)
    if not value.is_cuda or value.element_size() != 2 or len(users) != 1:
        return None
    is_conversion = users[0].target == torch.ops.prims.convert_element_type.default
    return users[0] if is_conversion and users[0].args[1] == torch.float32 else None
