use std::collections::BTreeMap;

use super::*;

const KEEP: Keep = Keep { steps: 100_000, days: None };

fn a_step(instance: &str, at: u64, recovered: Option<bool>) -> RecoveryStep {
    RecoveryStep {
        incident: 1,
        instance: instance.into(),
        incarnation: 2,
        at_unix_ms: at,
        offset_us: 5,
        phase: "PREPARING_RECOVERY".into(),
        detail: "fence".into(),
        recovered,
    }
}

async fn sound(store: &SqliteStore) -> String {
    store.with("check", |db| db.query_row("PRAGMA integrity_check", [], |r| r.get(0))).await.unwrap()
}

/// A disk that is full from here on, or has room again.
async fn disk(store: &SqliteStore, full: bool) {
    store
        .with("limit", move |db| {
            let pages: i64 = db.query_row("PRAGMA page_count", [], |r| r.get(0))?;
            let max = if full { pages } else { 1 << 30 };
            db.query_row(&format!("PRAGMA max_page_count = {max}"), [], |_| Ok(()))
        })
        .await
        .unwrap();
}

#[tokio::test]
async fn survives_a_restart_and_filters() {
    let d = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    let mut follower = store.follow();
    for s in [a_step("a", 10, None), a_step("b", 20, None), a_step("a", 30, Some(true))] {
        store.write_step(s).await.unwrap();
    }
    assert_eq!(follower.recv().await.unwrap().at_unix_ms, 10);
    assert_eq!(store.count_incident().await.unwrap(), 1);
    store.put_record("a".into(), vec![1]).await.unwrap();
    store.put_record("a".into(), vec![2]).await.unwrap();
    drop(store);
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    assert_eq!(store.count_incident().await.unwrap(), 2);
    assert_eq!(store.records().await.unwrap(), [("a".to_string(), vec![2])]);
    let only_a = RecoveryLogArgs { instance: Some("a".into()), since_unix_ms: Some(11) };
    assert_eq!(store.read_steps(only_a).await.unwrap(), [a_step("a", 30, Some(true))]);
    assert_eq!(store.read_steps(RecoveryLogArgs::default()).await.unwrap().len(), 3);
    assert_eq!(sound(&store).await, "ok");
}

#[tokio::test]
async fn a_newer_layout_is_refused_and_an_older_one_becomes_the_newest() {
    let d = tempfile::tempdir().unwrap();
    let path = d.path().join("kmorph.db");
    let db = Connection::open(&path).unwrap();
    db.execute_batch(schema::oldest()).unwrap();
    db.pragma_update(None, "user_version", 1).unwrap();
    db.execute("INSERT INTO instances VALUES ('a', x'07')", []).unwrap();
    db.execute("INSERT INTO counters VALUES ('incident', 41)", []).unwrap();
    drop(db);
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    assert_eq!(store.records().await.unwrap(), [("a".to_string(), vec![7])]);
    assert_eq!(store.count_incident().await.unwrap(), 42);
    drop(store);
    let db = Connection::open(&path).unwrap();
    let version: i64 = db.query_row("PRAGMA user_version", [], |r| r.get(0)).unwrap();
    assert_eq!(version, 2);
    db.pragma_update(None, "user_version", 99).unwrap();
    let e = SqliteStore::open(d.path(), KEEP).err().unwrap();
    assert_eq!(e.kind, ErrorKind::Version);
    assert!(e.message.contains("99"), "{e}");
}

/// A record as the first release wrote it: a map without what came later.
fn an_old_record(heartbeat: u64, auto_heal: bool) -> Vec<u8> {
    use kmorph_actors::{InstanceRecord, Policy};
    let policy = Policy { heartbeat_timeout: Duration::from_secs(heartbeat), auto_heal, ..Policy::default() };
    let spec = kmorph_platform::InstanceSpec {
        name: "web".into(),
        id: kmorph_platform::InstanceId(1),
        cpus: vec![2],
        memory_bytes: 1 << 27,
        memory_base: None,
    };
    let record = InstanceRecord { incarnation: 3, ..InstanceRecord::new(spec, policy) };
    let mut map: BTreeMap<String, serde_json::Value> =
        serde_json::from_value(serde_json::to_value(&record).unwrap()).unwrap();
    for later in ["overrides", "maintenance"] {
        assert!(map.remove(later).is_some(), "{later}");
    }
    let policy = map.get_mut("policy").unwrap().as_object_mut().unwrap();
    for later in ["agent_silent", "morph_timeout", "drain_timeout"] {
        assert!(policy.remove(later).is_some(), "{later}");
    }
    let saved = map.get_mut("saved").unwrap().as_object_mut().unwrap();
    saved.insert("phase".into(), "FAILED".into());
    kmorph_control::encode(&map).unwrap()
}

#[tokio::test]
async fn records_of_the_first_release_are_understood_and_what_spawn_was_told_holds() {
    use kmorph_actors::{Key, Store};
    for (old, want) in [
        (an_old_record(5, false), vec![(Key::HeartbeatTimeout, "5s"), (Key::AutoHeal, "disabled")]),
        (an_old_record(1, true), vec![]),
    ] {
        let d = tempfile::tempdir().unwrap();
        let db = Connection::open(d.path().join("kmorph.db")).unwrap();
        db.execute_batch(schema::oldest()).unwrap();
        db.pragma_update(None, "user_version", 1).unwrap();
        db.execute("INSERT INTO instances VALUES ('web', ?1)", [old]).unwrap();
        drop(db);
        let store = SqliteStore::open(d.path(), KEEP).unwrap();
        let records = store.load_instances().await.unwrap();
        assert_eq!((records[0].incarnation, records[0].maintenance), (3, false));
        assert_eq!(records[0].overrides.entries().collect::<Vec<_>>(), want);
    }
}

#[tokio::test]
async fn what_is_no_database_and_what_others_may_write_is_refused_with_the_way_out() {
    let d = tempfile::tempdir().unwrap();
    std::fs::write(d.path().join("kmorph.db"), "this is not a database, whatever its name says").unwrap();
    let e = SqliteStore::open(d.path(), KEEP).err().unwrap();
    assert!(e.message.contains("move the file away"), "{e}");
    let open = d.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
    let e = SqliteStore::open(&open, KEEP).err().unwrap();
    assert_eq!(e.kind, ErrorKind::Denied);
    assert!(e.message.contains("chmod go-w"), "{e}");
}

#[tokio::test]
async fn a_full_disk_costs_history_until_there_is_room_again() {
    let d = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    let mut troubles = store.troubles();
    store.put_record("a".into(), vec![1]).await.unwrap();
    disk(&store, true).await;
    // Large enough to need another page at once.
    let big = |n: u8| vec![n; 20_000];
    let e = store.put_record("a".into(), big(2)).await.unwrap_err();
    assert!(e.message.contains("full"), "{e}");
    assert!(troubles.changed().await.is_ok() && troubles.borrow().as_ref().unwrap().contains("full"));
    // What comes meanwhile is kept, in order, the latest record only; incidents go on counting.
    let mut follower = store.follow();
    for n in 0..5 {
        assert!(store.write_step(a_step("a", n, None)).await.is_err());
    }
    assert_eq!(follower.recv().await.unwrap().at_unix_ms, 0, "followers see what is taken");
    store.put_record("a".into(), big(3)).await.unwrap_err();
    assert_eq!(store.count_incident().await.unwrap(), 1);
    assert_eq!(store.count_incident().await.unwrap(), 2);
    // Five steps, the latest record, and twice the number of incidents.
    assert_eq!(store.retry().await, 8);
    assert!(store.trouble().is_some(), "there is still no room");
    assert_eq!(store.records().await.unwrap()[0].1, vec![1], "what was there is whole");

    disk(&store, false).await;
    assert_eq!(store.retry().await, 0);
    assert_eq!(store.trouble(), None);
    assert!(troubles.changed().await.is_ok());
    let steps = store.read_steps(RecoveryLogArgs::default()).await.unwrap();
    assert_eq!(steps.iter().map(|s| s.at_unix_ms).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!(store.records().await.unwrap(), [("a".to_string(), big(3))]);
    store.write_step(a_step("a", 9, None)).await.unwrap();
    drop(store);
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    assert_eq!(store.count_incident().await.unwrap(), 3);
    assert_eq!(sound(&store).await, "ok");
}

#[tokio::test]
async fn a_journal_that_became_read_only_is_written_when_it_can_be_again() {
    let d = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    let read_only = |on: bool| store.with("limit", move |db| db.pragma_update(None, "query_only", on));
    read_only(true).await.unwrap();
    let e = store.write_step(a_step("a", 1, None)).await.unwrap_err();
    assert!(e.message.contains("readonly"), "{e}");
    assert!(store.trouble().is_some());
    read_only(false).await.unwrap();
    store.retry().await;
    assert_eq!(store.trouble(), None);
    assert_eq!(store.read_steps(RecoveryLogArgs::default()).await.unwrap(), [a_step("a", 1, None)]);
}

#[tokio::test]
async fn alone_it_does_without_the_index_it_shares() {
    let d = tempfile::tempdir().unwrap();
    let path = d.path().join("kmorph.db");
    let mut db = connect(&path, true).unwrap();
    schema::prepare(&mut db, &path).unwrap();
    db.execute("INSERT INTO instances VALUES ('a', x'07')", []).unwrap();
    assert!(!d.path().join("kmorph.db-shm").exists(), "this is what a full disk has no room for");
    let e = SqliteStore::open(d.path(), KEEP).err().unwrap();
    assert!(e.message.contains("another program has it open"), "{e}");
    drop(db);
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    assert_eq!(store.records().await.unwrap(), [("a".to_string(), vec![7])]);
}

#[tokio::test]
async fn a_long_trouble_keeps_a_bounded_number_of_steps() {
    let d = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(d.path(), Keep { steps: 1_000_000, days: None }).unwrap();
    disk(&store, true).await;
    store.put_record("a".into(), vec![0; 20_000]).await.unwrap_err();
    let extra = 50;
    let all = (0..writer::KEPT_STEPS as u64 + extra).map(|n| store.write_step(a_step("a", n, None)));
    futures::future::join_all(all).await;
    disk(&store, false).await;
    store.retry().await;
    let steps = store.read_steps(RecoveryLogArgs::default()).await.unwrap();
    assert_eq!((steps.len(), steps[0].at_unix_ms), (writer::KEPT_STEPS, extra));
}

/// Write many at once, in order: tokio would let others go first now and then, and who waits for room may be overtaken.
async fn write_all(store: &SqliteStore, steps: impl Iterator<Item = RecoveryStep>) {
    let mut steps = steps.peekable();
    while steps.peek().is_some() {
        let some = futures::future::join_all(steps.by_ref().take(QUEUE / 2).map(|s| store.write_step(s)));
        for result in tokio::task::unconstrained(some).await {
            result.unwrap();
        }
    }
}

/// Read until it is so: old steps go when nobody waits for the journal.
async fn until(store: &SqliteStore, so: impl Fn(&[RecoveryStep]) -> bool) {
    let look = async {
        while !so(&store.read_steps(RecoveryLogArgs::default()).await.unwrap()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), look).await.unwrap();
}

#[tokio::test]
async fn history_is_kept_as_long_as_configured() {
    let d = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(d.path(), Keep { steps: 1000, days: Some(1) }).unwrap();
    let day = 86_400_000;
    let all = (0..3000u64).map(|n| store.write_step(a_step("a", 10 * day + n, None)));
    for result in futures::future::join_all(all).await {
        result.unwrap();
    }
    until(&store, |steps| (1000..1000 + 256 + 512).contains(&steps.len())).await;
    store.set_keep(Keep { steps: 5000, days: Some(1) });
    let all = (0..600u64).map(|n| store.write_step(a_step("a", 12 * day + n, None)));
    futures::future::join_all(all).await;
    until(&store, |steps| steps.len() == 600 && steps.iter().all(|s| s.at_unix_ms >= 11 * day)).await;
}

#[tokio::test]
async fn old_steps_go_a_few_at_a_time() {
    let d = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    write_all(&store, (0..2000).map(|n| a_step("a", n, None))).await;
    let less = Keep { steps: 100, days: None };
    let gone = store.with("trim", move |db| writer::trim(db, less)).await.unwrap();
    assert_eq!(gone, writer::TRIM_BATCH);
    let left = store.read_steps(RecoveryLogArgs::default()).await.unwrap();
    assert_eq!((left.len(), left[0].at_unix_ms), (2000 - gone, gone as u64));
}

#[tokio::test]
async fn a_long_history_is_read_in_pieces_in_order() {
    let d = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    let names = ["a", "b"];
    write_all(&store, (0..5000).map(|n| a_step(names[n as usize % 2], n, None))).await;
    let times = |steps: Vec<RecoveryStep>| steps.iter().map(|s| s.at_unix_ms).collect::<Vec<_>>();
    let all = store.read_steps(RecoveryLogArgs::default()).await.unwrap();
    assert_eq!(times(all), (0..5000).collect::<Vec<_>>());
    let b = RecoveryLogArgs { instance: Some("b".into()), since_unix_ms: Some(1000) };
    assert_eq!(times(store.read_steps(b).await.unwrap()), (1001..5000).step_by(2).collect::<Vec<_>>());
    assert_eq!(store.read_some(&RecoveryLogArgs::default(), 0).await.unwrap().len(), PAGE as usize);
}

#[tokio::test]
async fn what_is_written_together_is_one_transaction() {
    let d = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    store.put_record("a".into(), vec![1]).await.unwrap();
    // A transaction writes each page it changed once; transactions one by one write at least one page each.
    let pages = || std::fs::metadata(d.path().join("kmorph.db-wal")).unwrap().len() / (4096 + 24);
    let before = pages();
    // The thread is held, so that everything below waits together.
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let held = store.with("hold", move |_| {
        wait.recv().unwrap();
        Ok(())
    });
    let writes = (0..BURST).map(|n| store.put_record(format!("i{n}"), vec![0; 500]));
    let go = async {
        while store.asks.capacity() > QUEUE - BURST {
            tokio::task::yield_now().await;
        }
        go.send(()).unwrap();
    };
    let (held, results, ()) = tokio::join!(held, futures::future::join_all(writes), go);
    held.unwrap();
    assert!(results.iter().all(Result::is_ok));
    assert_eq!(store.records().await.unwrap().len(), BURST + 1);
    let written = pages() - before;
    assert!(written < BURST as u64 / 2, "{written} pages");
}

/// Instances that restart at once.
const BURST: usize = 400;

#[tokio::test]
async fn a_damaged_file_says_the_way_out() {
    let d = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(d.path(), KEEP).unwrap();
    for n in 0..50 {
        store.put_record(format!("i{n}"), vec![n; 3000]).await.unwrap();
    }
    store
        .with("checkpoint", |db| db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())))
        .await
        .unwrap();
    drop(store);
    let path = d.path().join("kmorph.db");
    let mut bytes = std::fs::read(&path).unwrap();
    for page in bytes.chunks_mut(4096).skip(1) {
        page[..8].fill(0xff);
    }
    std::fs::write(&path, bytes).unwrap();
    let said = match SqliteStore::open(d.path(), KEEP) {
        Err(e) => e,
        Ok(store) => store.records().await.unwrap_err(),
    };
    assert!(said.message.contains("malformed") && said.message.contains("move the file away"), "{said}");
}
