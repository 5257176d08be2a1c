from mtetool.loops_numpy import (
    first_difference as first_difference,
)
from mtetool.loops_numpy import (
    frame_run as frame_run,
)
from mtetool.loops_numpy import (
    from_runs as from_runs,
)
from mtetool.loops_numpy import (
    mask as mask,
)
from mtetool.loops_numpy import (
    pack as pack,
)
from mtetool.loops_numpy import (
    page_run as page_run,
)
from mtetool.loops_numpy import (
    ram_records as ram_records,
)
from mtetool.loops_numpy import (
    rows as rows,
)
from mtetool.loops_numpy import (
    scan as scan,
)
from mtetool.loops_numpy import (
    tally as tally,
)
from mtetool.loops_numpy import (
    to_runs as to_runs,
)
from mtetool.loops_numpy import (
    unpack as unpack,
)
from mtetool.loops_numpy import (
    xor as xor,
)
