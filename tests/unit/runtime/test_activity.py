"""What a process notes of itself."""

from megavlm.runtime.activity import PHASES, Activity, Phase


def test_places_grow_with_what_is_done() -> None:
    activity = Activity()
    moments = [activity.now]
    for step in (1, 2):
        for phase in (Phase.READING, Phase.COMPARING, Phase.COMPUTING):
            activity.begin(phase, step=step)
            moments.append(activity.now)
        for _ in range(3):
            activity.advance()
            moments.append(activity.now)
        activity.begin(Phase.UPDATING)
        moments.append(activity.now)
    places = [moment.place for moment in moments]
    assert places == sorted(set(places))
    assert activity.now.step == 2
    times = [moment.since for moment in moments]
    assert times == sorted(times)


def test_a_phase_without_a_step_is_of_the_same_step() -> None:
    activity = Activity()
    activity.begin(Phase.COMPUTING, step=7)
    activity.advance()
    activity.begin(Phase.SAVING)
    assert (activity.now.step, activity.now.phase, activity.now.part) == (7, Phase.SAVING, 0)
    assert set(PHASES) == set(Phase)
