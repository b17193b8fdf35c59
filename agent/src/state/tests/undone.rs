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

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_has_served_says_so_whatever_becomes_of_others_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut old, mut new, token) = nearly_there(&dir).await;
    let (took, _) = tokio::join!(new.takes_over(), old.hands_over(token));
    assert!(took.took_over && took.reply.unwrap().ok);
    // It has nothing to do with the morph, and never begins.
    let (other, fails) = cells("other");
    fails.store(true, Ordering::SeqCst);
    hooked(&new.broker, &other).await;
    assert!(new.forgets().await);
    // An agent that was started anew does not know who was in it.
    let broker = Arc::<Broker>::default();
    hooked(&broker, &new.service).await;
    hooked(&broker, &other).await;
    new.daemon = daemon(&broker).await;
    assert!(new.forgets().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_stands_still_while_a_workload_that_would_be_left_behind_begins() {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let mut old = kernel().await;
    old.broker.serves();
    old.is(State::Active).await;
    assert_eq!(old.negotiate(vec![]).await.0.len(), 2);
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let mut ours = BufReader::new(ours);
    let hello = "hello version=1 name=late state=new\nsection name=s version=1 size=1 compatible=c\nready\n";
    ours.write_all(hello.as_bytes()).await.unwrap();
    let introduced = introduce(theirs).await.unwrap();
    old.broker.enter(introduced.hook());
    tokio::spawn(introduced.run());
    let mut told = String::new();
    ours.read_line(&mut told).await.unwrap();
    assert_eq!(told, "activate\n");
    let (_, reply, _) = old.export(0, true).await;
    assert!(!reply.ok && reply.detail.contains("workload late came when it was agreed"), "{reply:?}");
    assert_eq!(old.service.state(), State::Active);
    // One that cannot begin has nothing that could be lost.
    ours.write_all(b"error not now\n").await.unwrap();
    while old.broker.hooks().iter().any(|h| h.name == "late" && h.serves_soon()) {
        tokio::task::yield_now().await;
    }
    assert!(old.export(0, true).await.1.ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_morph_that_is_agreed_on_again_uses_the_memory_that_is_shared_then() {
    const KEY: u64 = 7;
    let dir = tempfile::tempdir().unwrap();
    let (mut old, mut new) = (kernel().await, kernel().await);
    for (kernel, id) in [(&old, 1), (&new, 2)] {
        kernel.broker.reaches(Reach::Folder(dir.path().to_owned(), id));
    }
    old.broker.serves();
    old.is(State::Active).await;
    let service = old.service.clone();
    blocking(move || assert_eq!(Client::new(&service, 1).ask(&[3, 4, 5]), [1, 1, 1])).await;
    let window = dir.path().join(kmp::stand_in::names::window(KEY));
    for _ in 0..2 {
        // A daemon that was started anew removes what the one before it made.
        if window.exists() {
            std::fs::remove_file(&window).unwrap();
        }
        std::fs::File::create(&window).unwrap().set_len(8 << 20).unwrap();
        let (sections, _) = old.negotiate(vec![]).await;
        let capabilities = vec![kmp::message::DIRECT.to_owned()];
        let asks = MorphNegotiate { morph: 7, capabilities, sections, window: KEY, ..Default::default() };
        let agreed = new.ask(asks).await;
        let Message::MorphNegotiate(MorphNegotiate { token, window: KEY, .. }) = agreed else {
            panic!("{agreed:?}")
        };
        let round = MorphTransferState { morph: 7, peer: 2, token, window: KEY, ..Default::default() };
        let sent = old.end(round).await;
        assert!(sent.direct && sent.reply.unwrap().ok && sent.shared > 0);
        let end = MorphTransferState { morph: 7, last: true, direct: true, ..Default::default() };
        let arrived = new.end(end).await.reply.unwrap();
        assert!(arrived.ok, "{arrived:?}");
        assert!(std::fs::read(&window).unwrap().iter().any(|byte| *byte != 0), "nothing is there");
    }
}
