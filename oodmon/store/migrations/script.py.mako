"""${message}"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the tables to ${up_revision}."""
    ${upgrades if upgrades else "raise NotImplementedError"}


def downgrade() -> None:
    """Bring the tables back to ${down_revision}."""
    ${downgrades if downgrades else "raise NotImplementedError"}
