import warnings

from rl.callbacks.alarm import NoOpAlarm


def warned(series, patience=20, shadows=()):
    alarm = NoOpAlarm(shadows, patience)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, metrics in enumerate(series, start=1):
            alarm(step, metrics, {})
    return [str(w.message) for w in caught]


def touched(*values):
    return [{"plugin/steer/touched": v, "plugin/steer/adv_mass": 1.0} for v in values]


def test_an_idle_plugin_is_named_once_after_its_patience():
    assert warned(touched(*[0.0] * 19)) == []
    (message,) = warned(touched(*[0.0] * 60))
    assert "plugin.steer" in message and "step 20" in message and "no-op" in message


def test_one_touched_token_starts_the_count_again():
    assert warned(touched(*[0.0] * 19, 0.01, *[0.0] * 19)) == []
    assert len(warned(touched(*[0.0] * 20, 0.01, *[0.0] * 20))) == 2


def test_every_idle_plugin_has_its_own_warning_and_a_busy_one_none():
    series = [{"plugin/a/touched": 0.0, "plugin/b/touched": 0.0, "plugin/c/touched": 0.2}] * 20
    messages = warned(series)
    assert len(messages) == 2 and "plugin.a" in "".join(messages) and "plugin.b" in "".join(messages)


def test_groups_without_reward_spread():
    dead = {"rollout/zero_std_groups": 1.0}
    (message,) = warned([dead] * 25)
    assert "reward spread" in message and "too hard" in message
    assert warned([dead] * 19 + [{"rollout/zero_std_groups": 0.99}] + [dead] * 19) == []
    assert warned([{"rollout/zero_std_groups": 0.5}] * 40) == []
