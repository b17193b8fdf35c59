//! An instance gets a standby, crashes, and is its standby afterwards; another one is armed.

use kmorph_control::PolicyChange;

use super::*;

fn ready(v: &InstanceView) -> bool {
    v.standby.as_ref().is_some_and(|s| s.state == "ready")
}

async fn ask_until(home: &Home, so: impl Fn(&InstanceView) -> bool) -> Result<(), OpError> {
    let limit = Instant::now() + LIMIT;
    loop {
        let one = view(home).await?;
        if so(&one) {
            return Ok(());
        }
        assert!(Instant::now() < limit, "it never is: {one:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Whether it crashed, for as long as the daemon lives.
async fn crash(home: &Home, crashed: &mut bool) -> Result<(), OpError> {
    all_serve(home).await?;
    let set =
        Request::PolicySet { instance: "one".into(), key: "standby".into(), value: Some("same".into()) };
    let _: Vec<PolicyChange> = ask(home, &set).await?;
    ask_until(home, ready).await?;
    *crashed = true;
    home.fault(1, &["panic"]);
    ask_until(home, |v| v.recoveries == 1 && v.incident.is_none() && ready(v)).await?;
    let one = view(home).await?;
    assert_eq!((one.id, one.incarnation), (511, 2), "{one:?}");
    Ok(())
}

/// One story with a daemon killed at boundary `n`, and its end. False: it has no such boundary.
async fn killed_at(n: u64) -> bool {
    let home = Home::new("");
    let daemon = home.start().await;
    daemon.spawn("one").await;
    daemon.spawn("two").await;
    daemon.stop(false).await;
    let (first, neighbour) = (home.pid(1), home.pid(2));
    assert!(first.is_some() && neighbour.is_some());

    let (mut child, answered) = start(&home, n).await;
    let mut crashed = false;
    let told = if answered { Some(crash(&home, &mut crashed).await) } else { None };
    if child.try_wait().unwrap().is_none() && matches!(told, Some(Ok(()))) {
        kill(Pid::from_raw(child.id().unwrap() as i32), Signal::SIGTERM).unwrap();
    }
    let ended = timeout(LIMIT, child.wait()).await.unwrap().unwrap();
    let boundaries = std::fs::read_to_string(home.path("boundaries")).unwrap_or_default();
    let last = boundaries.lines().last().unwrap_or("").to_owned();
    let when = format!("killed at {last}, told {told:?}");
    if ended.success() {
        assert!((boundaries.lines().count() as u64) < n, "{when}");
        return false;
    }
    assert_eq!(ended.signal(), Some(9), "{when}");

    let daemon = home.start().await;
    let recovered = |v: &InstanceView| !crashed || home.pid(1) != first || v.id != 1;
    let settled = |v: &InstanceView| {
        let settled = v.standby.is_none() || ready(v);
        v.state == InstanceState::Healthy && v.incident.is_none() && settled && recovered(v)
    };
    let one = daemon.until("one", settled).await;
    if !crashed {
        assert_eq!((one.id, one.incarnation, home.pid(1)), (1, 1, first), "{when}: it was disturbed");
    }
    if boundaries.contains("after decide") {
        assert_eq!((one.id, one.incarnation), (511, 2), "{when}: {one:?}");
    }
    // Of the kernel that died nothing is left, and there is one standby when one is wanted.
    let kernels = 2 + usize::from(one.standby.is_some());
    let limit = Instant::now() + LIMIT;
    while home.stand_ins() < kernels || claims(&home) != kernels {
        assert!(Instant::now() < limit, "{when}: {}", home.log());
        sleep(Duration::from_millis(5)).await;
    }
    let two = daemon.until("two", |v| v.state == InstanceState::Healthy).await;
    assert_eq!((two.incarnation, home.pid(2)), (1, neighbour), "{when}: the neighbour");
    exact(&home, &daemon, kernels, &when).await;
    let steps = daemon.steps().await;
    let incidents: std::collections::BTreeSet<u64> = steps.iter().map(|s| s.incident).collect();
    for incident in incidents {
        let ended = steps.iter().any(|s| s.incident == incident && s.recovered.is_some());
        assert!(ended, "{when}: incident {incident} is open: {steps:?}");
    }
    daemon.stop(true).await;
    assert_eq!((home.stand_ins(), claims(&home)), (0, 0), "{when}");
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_every_boundary_of_a_takeover_one_kernel_serves_and_one_waits() {
    at_each(killed_at).await;
}
