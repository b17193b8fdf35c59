//! Workloads that are lost, late or unable when a morph is decided or undone.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_comes_back_after_the_morph_was_undone_goes_on() {
    let mut old = kernel().await;
    old.broker.serves();
    old.is(State::Active).await;
    assert_eq!(old.negotiate(vec![]).await.0.len(), 2);
    assert!(old.export(0, true).await.1.ok);
    old.is(State::Frozen).await;
    // Its connection is lost, and whoever undoes the morph finds nobody to tell.
    old.connected.abort();
    while !old.broker.hooks().is_empty() {
        tokio::task::yield_now().await;
    }
    assert!(old.roll_back(true).await.ok);
    assert_eq!(old.service.state(), State::Frozen);
    hooked(&old.broker, &old.service).await;
    old.is(State::Active).await;
    // The next morph has it stand still as ever, also when it is lost.
    assert_eq!(old.negotiate(vec![]).await.0.len(), 2);
    assert!(old.export(0, true).await.1.ok);
    hooked(&old.broker, &old.service).await;
    old.is(State::Frozen).await;
    assert!(old.roll_back(true).await.ok);
    old.is(State::Active).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_was_started_anew_has_those_go_on_who_come_to_it_after_the_morph_was_undone() {
    let old = kernel().await;
    old.broker.serves();
    old.is(State::Active).await;
    old.service.freeze().unwrap();
    let broker = Arc::<Broker>::default();
    let mut new_agent = Kernel { daemon: daemon(&broker).await, broker, ..old };
    assert!(new_agent.roll_back(true).await.ok);
    hooked(&new_agent.broker, &new_agent.service).await;
    new_agent.is(State::Active).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_took_over_and_does_not_serve_says_so_whoever_asks() {
    let dir = tempfile::tempdir().unwrap();
    let (mut old, mut new, token) = nearly_there(&dir).await;
    new.fails.store(true, Ordering::SeqCst);
    let (took, _) = tokio::join!(new.takes_over(), old.hands_over(token));
    let why = took.reply.unwrap();
    assert!(took.took_over && !why.ok && why.detail.contains("no room"), "{why:?}");
    let ask = || MorphRollback { morph: 7, ..Default::default() };
    for (fails, serves) in [(true, false), (false, true)] {
        new.fails.store(fails, Ordering::SeqCst);
        let Message::MorphRollback(said) = new.ask(ask()).await else { panic!("no answer") };
        assert_eq!((said.took_over, said.reply.unwrap().ok), (true, serves));
    }
    new.is(State::Active).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_was_started_anew_hears_of_its_workloads_that_it_took_over() {
    let new = kernel().await;
    new.service.activate().unwrap();
    let broker = Arc::<Broker>::default();
    let mut again = Kernel { daemon: daemon(&broker).await, broker: broker.clone(), ..new };
    let service = again.service.clone();
    let (took_over, _) = tokio::join!(again.forgets(), hooked(&broker, &service));
    assert!(took_over);
    // One that nobody comes to has not; that it said so is remembered.
    let broker = Arc::<Broker>::default();
    again.daemon = daemon(&broker).await;
    assert!(!again.forgets().await);
    let began = tokio::time::Instant::now();
    assert!(!again.forgets().await);
    assert!(began.elapsed() < Duration::from_millis(500), "it waited again");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_stands_still_when_a_workload_would_be_left_behind() {
    let mut old = kernel().await;
    old.broker.serves();
    old.is(State::Active).await;
    assert_eq!(old.negotiate(vec![]).await.0.len(), 2);
    let (late, _) = cells("late");
    hooked(&old.broker, &late).await;
    old.is(State::Active).await;
    let (_, reply, _) = old.export(0, true).await;
    assert!(!reply.ok && reply.detail.contains("workload late came when it was agreed"), "{reply:?}");
    assert_eq!((old.service.state(), late.state()), (State::Active, State::Active));
    // Everything there is in the next one.
    assert_eq!(old.negotiate(vec![]).await.0.len(), 4);
    assert!(old.export(0, true).await.1.ok);
    old.is(State::Frozen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_whose_workload_is_lost_with_what_it_was_given_does_not_take_over() {
    let dir = tempfile::tempdir().unwrap();
    let (mut old, mut new, token) = nearly_there(&dir).await;
    new.connected.abort();
    while !new.broker.hooks().is_empty() {
        tokio::task::yield_now().await;
    }
    let (took, _) = tokio::join!(new.takes_over(), old.hands_over(token));
    assert!(!took.took_over && !took.reply.unwrap().ok);
    let reply = new.commit(true).await;
    assert!(!reply.ok && reply.detail.contains("workload cells is lost"), "{reply:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_given_in_a_morph_that_was_broken_off_is_forgotten_before_the_next() {
    let (mut old, mut new) = (kernel().await, kernel().await);
    old.broker.serves();
    old.is(State::Active).await;
    let fresh = new.service.digest("memory").unwrap();
    let service = old.service.clone();
    blocking(move || assert_eq!(Client::new(&service, 1).ask(&[3]), [1])).await;
    let (offered, _) = old.negotiate(vec![]).await;
    assert!(new.negotiate(offered.clone()).await.1.ok);
    let (pieces, ..) = old.export(0, false).await;
    assert!(new.import(0, pieces).await.ok);
    assert_ne!(new.service.digest("memory").unwrap(), fresh);
    assert!(new.negotiate(offered).await.1.ok);
    assert!(new.import(0, vec![]).await.ok);
    assert_eq!(new.service.digest("memory").unwrap(), fresh);
}
