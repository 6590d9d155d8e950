"""PaCAStrategy and the callbacks around it: when things happen in a Lightning run. The folders below say what.

``paca`` has the life cycle and ``checkpoint_compatibility`` what a resumed run compares; ``adapter_checkpoint`` leaves
an adapter behind, ``column_selection`` runs training batches to choose columns, ``averaging`` serves averaged models.
May import ``core``, ``layers``, ``conversion``, ``adapters``, ``strategies`` and ``other_methods``.
Limits: every wrapped method of Lightning is in ``method_hooks``; a callback holds nothing that a second one would miss.
"""

import lightning.pytorch  # noqa: F401  (first: its import registers these callbacks, which must not be half imported)
