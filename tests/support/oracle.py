"""What a plan computes, by brute force: written against NCCL's rules, and knowing nothing of check.py or lower.py."""

from collections import Counter, defaultdict

from megatron_bfpp.schedule import Op

WINDOW = 2  # a send is waited for before the second compute action after it: the promise of check.py, repeated here


class Broken(Exception):
    """The plan hangs, or asks a rank for what it does not have."""


INPUTS, WEIGHTS = "the input's gradients", "the weights' gradients"  # what a backward adds to the story of a stage


class Machine:
    """All ranks in lockstep. Each value is the hash of all that it was computed from; labels are only names.

    A B makes the gradient of the stage's input and adds to those of its weights. An I makes the first and keeps what it
    was made from; the W of the same micro-batch adds the second, from that alone, and without parameters. The two give
    what the B gives, so a stage may be split or whole; but not for some of its micro-batches, for which the runtime has
    no way: it prepares the layers of a stage for one of the two.

    Sends and receives of one direction and one pair of ranks meet by order alone. A send is complete once its receive
    is posted; buffered: at once, as on a transport with buffers.

    resident: parameters are sharded, and a rank has room for so many gathered chunks; None: they are replicated.
    """

    def __init__(self, plan, shape, buffered=False, resident=None):
        self.plan, self.shape, self.buffered, self.resident = plan, shape, buffered, resident
        self.gathered = [{} for _ in plan]  # per rank, stage -> whether it has run since its gather
        self.at = [0] * len(plan)
        self.sent, self.posted = defaultdict(list), defaultdict(list)
        self.results, self.buffers = {}, {}
        self.owed = {}  # (stage, microbatch) -> what an I has kept for its W
        self.backwards = defaultdict(set)  # stage -> the kinds of its backwards
        self.unfinished = [[[]] for _ in plan]
        self.story = defaultdict(list)  # per stage: what its forwards, its backwards and its reduction worked on
        self.counts = Counter()

    def run(self):
        """The meaning of the plan; Broken where it has none."""
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(self.plan):
                if self.at[rank] < len(actions) and self.step(rank, actions[self.at[rank]]):
                    self.at[rank] += 1
                    moved = True
        if any(at < len(actions) for at, actions in zip(self.at, self.plan, strict=True)):
            raise Broken("hangs")
        if any(len(self.sent[key]) != len(self.posted[key]) for key in {*self.sent, *self.posted}) or self.buffers:
            raise Broken("a message is left over for the next step")
        if self.owed or any({Op.B, Op.I} <= kinds for kinds in self.backwards.values()):
            raise Broken("a backward is half done, or some of a stage are whole and some are split")
        if any(self.gathered):
            raise Broken("the optimizer changes shards of which a gathered copy stays")
        return dict(self.story), self.counts

    def step(self, rank, action):
        """Run one action; False if it must wait."""
        stage, op, microbatch = action
        size, last = self.shape.pp_size, self.shape.pp_size * self.shape.num_chunks - 1
        if stage % size != rank or stage > last:
            raise Broken("a stage of another rank")
        if op in (Op.F, Op.B, Op.I):
            kind = Op.F if op is Op.F else Op.B
            buffer = None if stage == (0 if op is Op.F else last) else (stage, kind, microbatch)
            return self.compute(rank, action, kind, buffer)
        if op in (Op.SEND_F, Op.RECV_F, Op.SEND_B, Op.RECV_B):
            kind = Op.F if op in (Op.SEND_F, Op.RECV_F) else Op.B
            forward, sends = kind is Op.F, op in (Op.SEND_F, Op.SEND_B)
            other = stage + (1 if forward == sends else -1)
            if not 0 <= other <= last:
                raise Broken("a message over the end of the model")
            key = (kind, rank, other % size) if sends else (kind, other % size, rank)
            if sends:
                if (stage, kind, microbatch) not in self.results:
                    raise Broken("sends what it has not computed")
                self.unfinished[rank][-1].append((key, len(self.sent[key])))
                self.sent[key].append(self.results[stage, kind, microbatch])
            else:
                if (stage, kind, microbatch) in self.buffers:
                    raise Broken("a buffer in use")
                self.buffers[stage, kind, microbatch] = key, len(self.posted[key])
                self.posted[key].append(action)
        elif op is Op.W:
            if (stage, microbatch) not in self.owed:
                raise Broken("the gradients of weights for which nothing was kept")
            self.add(stage, WEIGHTS, microbatch, self.owed.pop((stage, microbatch)))
            return True
        else:
            self.counts[stage, op] += 1
            if op is Op.RESHARD or (op is Op.UNSHARD and self.resident is not None):
                self.place(self.gathered[rank], stage, op)
            if op is Op.REDUCE_GRAD:
                gradients = (*self.story[stage, INPUTS], *self.story[stage, WEIGHTS])
                self.story[stage, Op.REDUCE_GRAD].append(gradients)
        # Each message counts, although nothing computed depends on a second copy of it.
        self.counts[action] += 1
        return True

    def place(self, gathered, stage, op):
        """Fill or free one of a rank's places for gathered parameters."""
        if self.resident is None:
            raise Broken("gives up parameters of which there is no shard")
        if op is Op.UNSHARD:
            if stage in gathered or len(gathered) == self.resident:
                raise Broken("a gather without a place")
            gathered[stage] = False
        elif not gathered.pop(stage, False):
            raise Broken("frees an empty place, or one whose gather was in vain")

    def add(self, stage, what, microbatch, *of):
        """Add a value to the story of a stage, and return it.

        Its number stands for the data iterator, which hands out the next microbatch whatever its name, and for the
        order in which gradients are added up.
        """
        story = self.story[stage, what]
        value = hash((stage, what, len(story), *of))
        story.append((microbatch, value))
        return value

    def compute(self, rank, action, kind, buffer):
        stage, op, microbatch = action
        if self.resident is not None and stage not in self.gathered[rank]:
            raise Broken("computes without parameters")
        due = [message for sends in self.unfinished[rank][: 1 - WINDOW] for message in sends]
        if not self.buffered and any(len(self.posted[key]) <= number for key, number in due):
            return False
        message = "none"
        if buffer is not None:
            if buffer not in self.buffers:
                raise Broken("computes on a message that it never asked for")
            key, number = self.buffers[buffer]
            if len(self.sent[key]) <= number:
                return False
            message = self.sent[key][number]
            del self.buffers[buffer]
        if kind is Op.B and (stage, Op.F, microbatch) not in self.results:
            raise Broken("a backward without its forward")
        # Replicated parameters are gathered once after the optimizer: before it the forward would see the old ones.
        gathers = self.counts[stage, Op.UNSHARD] if self.resident is None else 1
        if kind is Op.F:
            self.results[stage, kind, microbatch] = self.add(stage, Op.F, microbatch, message, gathers)
        else:
            kept = message, self.results[stage, Op.F, microbatch]
            self.results[stage, kind, microbatch] = self.add(stage, INPUTS, microbatch, *kept)
            self.backwards[stage].add(op)
            if op is Op.B:
                self.add(stage, WEIGHTS, microbatch, kept)
            elif (stage, microbatch) in self.owed:
                raise Broken("keeps for a W what is kept already")
            else:
                self.owed[stage, microbatch] = kept
        self.unfinished[rank] = [*self.unfinished[rank], []][-WINDOW:]
        if self.resident is not None:
            self.gathered[rank][stage] = True
        return True


def meaning(plan, shape, buffered=False, resident=None):
    """What `plan` computes, comparable with ==; a string where it hangs or breaks."""
    try:
        return Machine(plan, shape, buffered, resident).run()
    except Broken as error:
        return str(error)
